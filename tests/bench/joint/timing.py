"""Times of functions that take turns, so that whatever else the machine does falls on all of them alike."""

import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles


def cpu_seconds(function: Callable[[], object]) -> float:
    """Of this process."""
    started = time.process_time()
    function()
    return time.process_time() - started


def measure_in_turns(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[Callable[[], object]], float] = cpu_seconds,
) -> dict[str, list[float]]:
    """Seconds of every call by `clock`, by name; one call of each comes before and does not count."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(clock(function))
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    """Of medians."""
    return median(above) / median(below)


def spread(seconds: list[float]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    if len(seconds) < 2:
        return 0.0
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return (high - low) / 2 / median(seconds)
