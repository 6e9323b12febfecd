"""Times of functions that take turns, so that whatever else the machine does falls on all of them alike.

With one thread CPU seconds are the seconds that pass, less those in which another process had the core.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles


def cpu_seconds(function: Callable[[], object]) -> float:
    """Return the CPU seconds that this process spends in `function`."""
    started = time.process_time()
    function()
    return time.process_time() - started


def measure_in_turns(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[Callable[[], object]], float] = cpu_seconds,
    warm_ups: int = 1,
) -> dict[str, list[float]]:
    """Return the seconds of every call by `clock`, by name; `warm_ups` rounds come before and do not count.

    A round calls each function once, so that a slow minute is slow for all; every second round goes backwards.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    forwards = list(functions.items())
    for number in range(-warm_ups, rounds):
        for name, function in forwards if number % 2 else reversed(forwards):
            passed = clock(function)
            if number >= 0:
                seconds[name].append(passed)
    return seconds


def time_interleaved(functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median CPU seconds of each function, called in turn."""
    numbered = {str(number): function for number, function in enumerate(functions)}
    return [median(seconds) for seconds in measure_in_turns(numbered, rounds, warm_ups=2).values()]


def ratio(above: list[float], below: list[float]) -> float:
    """Return the ratio of the medians."""
    return median(above) / median(below)


def spread(seconds: list[float]) -> float:
    """Return half the distance between the quartiles, as a share of the median."""
    if len(seconds) < 2:
        return 0.0
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return (high - low) / 2 / median(seconds)
