"""What ranks tell each other once per step, in one collective: a signal, a verdict, how long they took."""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pretrain.health.guard import Verdict
from pretrain.run.process_group import gather_over_ranks

DECAY = 0.9  # of the running mean of how late a rank is: about ten steps of memory
REPEAT_STEPS = 100  # between two reports of the same rank


@dataclass(frozen=True)
class Beat:
    """The same on every rank. signal: number of one that some rank was sent, or 0. verdict: the gravest.

    seconds: [ranks] of each rank's own part of the step: reading data, and until its gradients were ready.
    """

    signal: int
    verdict: Verdict
    seconds: list[float]


def exchange(signal: int, verdict: Verdict, seconds: float, device: torch.device) -> Beat:
    """All ranks together."""
    mine = torch.tensor([signal, verdict, seconds], dtype=torch.float64, device=device)
    everyone = torch.empty(dist.get_world_size() * 3, dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(everyone, mine)
    signals, verdicts, times = everyone.view(-1, 3).t().tolist()
    return Beat(int(max(signals)), Verdict(int(max(verdicts))), times)


class OwnTime:
    """How long this rank computes before it meets the others of its data-parallel group to add up gradients.

    After that meeting every rank has taken equally long; before it, a slow copy of the model shows.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._start = self._ready = self._mark()

    def start(self) -> None:
        """The forward begins."""
        self._start = self._mark()

    def gradients_ready(self) -> None:
        """The last backward is done, and nothing is added up yet."""
        self._ready = self._mark()

    @property
    def seconds(self) -> float:
        """Of the last step; on a GPU the device must have finished it."""
        if self._on_gpu:
            return self._start.elapsed_time(self._ready) / 1000
        return self._ready - self._start

    def _mark(self) -> Any:
        if not self._on_gpu:
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

    def update(self, seconds: list[float], step: int) -> list[tuple[int, float]]:
        """(rank, how many times the median it takes) of ranks to report now. seconds: Beat.seconds."""
        found = []
        for ranks in self.peers:
            typical = max(median_low(seconds[rank] for rank in ranks), 1e-9)
            for rank in ranks:
                ratio = min(seconds[rank] / typical, 2 * self.factor)  # no single step is enough
                late = DECAY * self._lateness[rank] + (1 - DECAY) * ratio
                self._lateness[rank] = late
                is_due = step - self._reported.get(rank, -REPEAT_STEPS) >= REPEAT_STEPS
                if late > self.factor and is_due:
                    self._reported[rank] = step
                    found.append((rank, late))
        return found


def _place_in_copy() -> tuple[int, ...]:
    """Of this rank among those that train on the same sequences."""
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
