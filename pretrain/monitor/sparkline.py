"""A curve in one line of text."""

import math
from collections.abc import Sequence
from itertools import pairwise

BARS = "▁▂▃▄▅▆▇█"
GAP = " "
CLIPPED_SHARE = 0.1  # of the values at either end: the first steps of a training dwarf everything after them
SMALLEST_SPAN = 0.01  # of the value: what varies less is drawn flat, not as noise at full height


def draw_sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` characters; each is the mean of its share of `values`. A gap where none of them is known."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [round(index * len(values) / width) for index in range(width + 1)]
    means = [_mean(values[first:last]) for first, last in pairwise(edges)]
    known = sorted(mean for mean in means if mean is not None)
    if not known:
        return GAP * width
    clipped = int(CLIPPED_SHARE * len(known))
    low, high = known[clipped], known[-1 - clipped]
    high = max(high, low + SMALLEST_SPAN * abs(low))
    return "".join(GAP if mean is None else _bar(mean, low, high) for mean in means)


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _bar(value: float, low: float, high: float) -> str:
    if high <= low:
        return BARS[0]
    share = (min(max(value, low), high) - low) / (high - low)
    return BARS[min(int(share * len(BARS)), len(BARS) - 1)]
