"""Times and peak memory of functions on a device; what fails is reported and ends nothing else."""

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tests.bench.timing import measure_in_turns, spread
from tests.helpers.live_bytes import LiveBytes

WARM_UPS = 2
HEAD_START_CYCLES = 10_000_000  # 5 to 6 ms
LONGEST_MESSAGE = 300


@dataclass(frozen=True)
class Meter:
    """A meter of time and memory on one device."""

    device: torch.device

    @property
    def is_cuda(self) -> bool:
        """Return whether it measures with CUDA's events and allocator."""
        return self.device.type == "cuda"

    def seconds(self, function: Callable[[], object]) -> float:
        """Time the function from its first kernel's start to its last one's end, gaps between them included.

        The device is busy at first, so that the host is ahead of it, as in a run of many steps.
        """
        if not self.is_cuda:
            started = time.perf_counter()
            function()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    def peak_bytes(self, function: Callable[[], object], known: Iterable[Tensor]) -> int:
        """Return the most bytes alive at a time beyond what was before.

        known: tensors that were alive before, for the CPU's count.
        """
        if not self.is_cuda:
            with LiveBytes(known) as live:
                function()
            return live.peak
        self.release()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def saved_bytes(self, forward: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
        """Return the bytes alive after a forward beyond what was before and its output, which nothing may save.

        known: see peak_bytes. While the CPU's count goes on, nothing runs compiled.
        """
        if not self.is_cuda:
            with LiveBytes(known) as live:
                output = forward()
                return live.now - output.untyped_storage().nbytes()
        self.release()
        before = torch.cuda.memory_allocated()
        output = forward()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before - output.untyped_storage().nbytes()

    def release(self) -> None:
        """Give back to the device what nobody uses."""
        if self.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def measure(
    meter: Meter, functions: Mapping[str, Callable[[], object]], rounds: int, known: Iterable[Tensor] = ()
) -> dict[str, dict[str, Any]]:
    """Return by name {"seconds" (median), "spread", "peak_bytes"}, or {"error"}; functions that work take turns."""
    known, peaks = list(known), {}
    guarded = {name: _Guarded(meter, function) for name, function in functions.items()}
    for run in guarded.values():
        for _ in range(WARM_UPS):
            run()
    times = measure_in_turns({name: run for name, run in guarded.items() if run.error is None}, rounds, meter.seconds)
    for name in times:
        peaks[name] = meter.peak_bytes(guarded[name], known)
    return {
        name: {"error": run.error}
        if run.error is not None
        else {"seconds": median(times[name]), "spread": spread(times[name]), "peak_bytes": peaks[name]}
        for name, run in guarded.items()
    }


class _Guarded:
    """A function that is not called again once it has failed; error is that of the failed call."""

    def __init__(self, meter: Meter, function: Callable[[], object]) -> None:
        self.meter, self.function, self.error = meter, function, None

    def __call__(self) -> None:
        if self.error is None:
            self.error = attempt(self.meter, self.function)


def attempt(meter: Meter, function: Callable[[], object]) -> str | None:
    """Call the function and return the first line of its error, if any.

    It may be out of memory, a kernel that does not compile, a missing operator.
    """
    try:
        function()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        message = f"{type(error).__name__}: {lines[0]}"[:LONGEST_MESSAGE]
    else:
        return None
    gc.collect()  # after the error, which held the frames and their tensors
    meter.release()
    return message
