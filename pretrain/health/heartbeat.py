"""Signs of life: what ranks exchange once per step, which rank is slow, and the end of a process that stands still."""

import faulthandler
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low
from typing import IO, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from pretrain.objective.losses import StepNumbers
from pretrain.run.process_group import gather_over_ranks

DECAY = 0.9  # of the running mean of how late a rank is: about ten steps of memory
REPEAT_STEPS = 100  # between two reports of the same rank
STACKS_FOLDER = "logs"


@dataclass(frozen=True)
class Beat:
    """Holds what all ranks know of a step; the same on every rank.

    signal: number of a signal that any rank received, or 0. seconds: [ranks] of each rank's own part of the step:
    reading data, and until its gradients were ready (on a GPU, in the step before). recompiled: [ranks] of kernels that
    each compiled in a step in which there should be none any more. numbers: [ranks] of what each knows of the step.
    """

    signal: int
    seconds: list[float]
    recompiled: list[int]
    numbers: list[StepNumbers]


class Heartbeat:
    """Measures this rank's own part of a step and exchanges it with signal and numbers, in one collective.

    It is the one point of a step where the host waits for its device. The clock stops before gradients are reduced:
    from there on every rank waits for the slowest, which hides it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._ready = self._mark()
        self._seconds_before = 0.0

    def start(self) -> None:
        """Note that the forward begins."""
        self._start = self._mark()

    def gradients_ready(self) -> None:
        """Note that the last backward is done, and nothing is added up yet."""
        self._ready = self._mark()

    def exchange(self, signal: int, data_seconds: float, recompiled: int, numbers: Tensor) -> Beat:
        """Tell all ranks about this one's step. All ranks call this together.

        numbers: of the step, as join_numbers joins them.
        """
        is_timed_later = self._device.type == "cuda"  # its events are not over yet
        seconds = self._seconds_before if is_timed_later else self._ready - self._start
        own = torch.tensor([signal, data_seconds + seconds, recompiled], dtype=torch.float64)
        mine = torch.cat([own.to(self._device), numbers])
        everyone = torch.empty(dist.get_world_size() * len(mine), dtype=torch.float64, device=self._device)
        dist.all_gather_into_tensor(everyone, mine)
        ranks = everyone.view(-1, len(mine)).tolist()
        if is_timed_later:
            self._seconds_before = self._start.elapsed_time(self._ready) / 1000
        signals, times, kernels = zip(*(rank[: len(own)] for rank in ranks), strict=True)
        of_step = [StepNumbers.of(rank[len(own) :]) for rank in ranks]
        return Beat(int(max(signals)), list(times), [int(number) for number in kernels], of_step)

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class Stragglers:
    """Finds ranks that are slower than those that do the same work: their data-parallel peers.

    factor: above this multiple of the peers' median, on average over some steps. peers: ranks by place in a copy of the
    model. lateness: running mean per rank. All ranks build one together.
    """

    factor: float
    peers: list[list[int]] = field(default_factory=list)
    _lateness: dict[int, float] = field(default_factory=lambda: defaultdict(lambda: 1.0))
    _reported: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for rank, place in enumerate(gather_over_ranks(_place_in_copy)):
            groups[place].append(rank)
        self.peers = list(groups.values())

    def compare(self, seconds: list[float]) -> dict[int, float]:
        """Return for each rank how many times its peers' median it takes. seconds: Beat.seconds."""
        ratios = {}
        for ranks in self.peers:
            typical = max(median_low(seconds[rank] for rank in ranks), 1e-9)
            ratios |= {rank: seconds[rank] / typical for rank in ranks}
        return ratios

    def update(self, ratios: dict[int, float], step: int) -> list[tuple[int, float]]:
        """Return (rank, how many times the median it takes) of ranks to report now. ratios: of this step."""
        found = []
        for rank, ratio in ratios.items():
            bounded = min(ratio, 2 * self.factor)  # no single step is enough
            late = DECAY * self._lateness[rank] + (1 - DECAY) * bounded
            self._lateness[rank] = late
            is_due = step - self._reported.get(rank, -REPEAT_STEPS) >= REPEAT_STEPS
            if late > self.factor and is_due:
                self._reported[rank] = step
                found.append((rank, late))
        return found


def _place_in_copy() -> tuple[int, ...]:
    """Return the place of this rank among those that train on the same sequences."""
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )


class Watchdog:
    """Ends this process after `minutes` without a sign of life, all stacks in `logs/stall_rank_<r>.txt`.

    Whatever a process waits for (a dead peer, a lost file system), it does not hang. Collectives have a timeout of
    their own (runtime.timeout_minutes); this one also covers reading, writing and CUDA. It runs in a thread of the
    interpreter that needs no lock, so it works while Python is blocked.
    """

    def __init__(self, run_dir: Path, rank: int, minutes: float) -> None:
        self._seconds = minutes * 60
        self._path = run_dir / STACKS_FOLDER / f"stall_rank_{rank}.txt"
        self._file: IO[str] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count the time while the block runs."""
        self.alive()
        try:
            yield
        finally:
            self._stop()

    def alive(self) -> None:
        """Start, or start again, to count."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")  # stacks of an earlier start stay
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)

    def _stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._file is None:
            return
        self._file.close()
        self._file = None
        with suppress(OSError):  # the folder may be gone, which must not hide why the run ends
            if not self._path.stat().st_size:
                self._path.unlink()
