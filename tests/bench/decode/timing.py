"""Timing that other processes disturb little: CPU seconds, interleaved, medians."""

import time
from collections.abc import Callable, Sequence
from statistics import median

WARM_UPS = 2


def time_interleaved(functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median CPU seconds of each function, called in turn.

    With one thread CPU seconds are the seconds that pass, less those in which another process had the core. A round
    calls each function once, so that a slow minute is slow for all; every second round goes backwards.
    """
    seconds: list[list[float]] = [[] for _ in functions]
    numbered = list(enumerate(functions))
    for number in range(-WARM_UPS, rounds):
        for index, function in numbered if number % 2 else reversed(numbered):
            begin = time.process_time()
            function()
            passed = time.process_time() - begin
            if number >= 0:
                seconds[index].append(passed)
    return [median(values) for values in seconds]
