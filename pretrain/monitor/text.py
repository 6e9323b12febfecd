"""Formats numbers, and curves in one line, as people read them."""

import math
from collections.abc import Sequence
from itertools import pairwise

SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
BARS = "▁▂▃▄▅▆▇█"
GAP = " "
CLIPPED_SHARE = 0.1  # of the values at either end: the first steps of a training dwarf everything after them
SMALLEST_SPAN = 0.01  # of the value: what varies less is drawn flat, not as noise at full height


def format_count(value: float) -> str:
    """Format a count: 12345 -> 12.3k; a billion is a B."""
    for size, suffix in SUFFIXES:
        if value >= size:
            return f"{value / size:.3g}{'B' if suffix == 'G' else suffix}"
    return f"{value:.3g}"


def format_bytes(value: float) -> str:
    """Format bytes: 1.5e9 -> 1.5 GB."""
    for size, suffix in SUFFIXES:
        if value >= size:
            return f"{value / size:.3g} {suffix}B"
    return f"{value:.0f} B"


def format_seconds(value: float) -> str:
    """Format seconds in the two largest units: 3 d 4 h, 2 h 5 min, 12 s, 0.4 s."""
    if value < 10:
        return f"{value:.1f} s"
    seconds = round(value)
    for size, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // below
            return f"{seconds // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds} s"


def draw_sparkline(values: Sequence[float], width: int) -> str:
    """Return at most `width` characters, each the mean of its share of `values`; a gap where none of them is known."""
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
