"""The pictures of an evaluation: rates of every mode, acceptance lengths, the trade-off that thresholds make.

Every picture carries a note on what was measured, for those who see it without its report.
"""

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from model.evaluate.evaluation import Evaluation
from model.evaluate.picture_style import (
    COLORS,
    DASHES,
    INK,
    MUTED,
    OUTLINE,
    add_legend,
    add_note,
    label_from_top,
    make_figure,
    save_png,
    style_axes,
)
from model.evaluate.statistics import ModeNumbers
from model.evaluate.variants import Variant
from model.hf.options import AR

INCHES_PER_VARIANT, INCHES_AROUND = 0.5, 1.7
LABEL_PIXELS = 34  # least distance between two labels

Line = list[tuple[Variant, ModeNumbers]]  # one mode in the order of thresholds


def draw_modes(evaluation: Evaluation, note: str) -> bytes:
    """Draw tokens per forward (with interval, AR's 1 and the ceiling), per position and per second; return a PNG.

    Variants stand from top to bottom.
    """
    variants = evaluation.plain_variants
    numbers = [evaluation.overall.modes[variant.name] for variant in variants]
    size = (11.5, INCHES_AROUND + INCHES_PER_VARIANT * len(variants))
    figure, ((left, middle, right),) = make_figure(1, 3, size, sharey=True)
    colors = [COLORS[variant.family] for variant in variants]
    intervals = [n.tokens_per_forward_interval for n in numbers]
    _draw_bars(left, [n.tokens_per_forward for n in numbers], colors, ".2f", intervals)
    _draw_bars(middle, [n.tokens_per_position for n in numbers], colors, ".3f")
    _draw_bars(right, [n.tokens_per_second for n in numbers], colors, ".0f")
    left.axvline(1, color=MUTED, linewidth=1, linestyle=DASHES, zorder=1)
    if ceiling := evaluation.add_ceilings():
        left.axvline(ceiling.tokens_per_forward, color=INK, linewidth=1.5, linestyle=DASHES, zorder=1)
        rate, without = ceiling.tokens_per_forward, ceiling.tokens_per_forward_without_commits
        left.set_title(f"speed of light {rate:.2f} (dashed), {without:.2f} without commits", fontsize=9, color=INK)
    label_from_top(left, [variant.name for variant in variants])
    for axes, label in ((left, "forward (95% interval)"), (middle, "computed position"), (right, "second")):
        axes.set_xlabel(f"tokens per {label}", color=INK)
        axes.margins(x=0.16)
        style_axes(axes)
    figure.suptitle("Decoding modes", color=INK, fontsize=13)
    add_note(figure, note)
    return save_png(figure)


def _draw_bars(
    axes: Any,
    values: list[float],
    colors: list[str],
    form: str,
    intervals: Sequence[tuple[float, float] | None] = (),
) -> None:
    """Draw horizontal bars from top to bottom, their values next to them, and intervals as lines."""
    axes.barh(range(len(values)), values, color=colors, height=0.55, zorder=3)
    for row, (value, interval) in enumerate(zip_longest(values, intervals)):
        if interval is not None:
            axes.plot(interval, [row, row], color=INK, linewidth=1.2, zorder=4)
        end = value if interval is None else max(value, interval[1])
        place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(format(value, form), (end, row), color=INK, fontsize=8.5, bbox=OUTLINE, zorder=2.5, **place)


def draw_acceptance(evaluation: Evaluation, note: str) -> bytes | None:
    """Draw the share of cycles by how many tokens they emitted, with a panel per speculative variant.

    Returns a PNG, or None without speculative variants.
    """
    found = [
        (variant, numbers)
        for variant in evaluation.plain_variants
        if (numbers := evaluation.overall.modes[variant.name]).acceptance_counts
    ]
    if not found:
        return None
    size = (8, 0.9 + 1.5 * len(found))
    figure, axes = make_figure(len(found), 1, size, sharex=True, sharey=True)
    for panel, (variant, numbers) in zip(axes[:, 0], found, strict=True):
        _draw_histogram(panel, numbers, COLORS[variant.family])
        panel.set_title(f"{variant.name}: mean {numbers.acceptance_length:.2f}", loc="left", fontsize=9.5, color=INK)
        style_axes(panel, grid="y")
    axes[-1, 0].set_xlabel("tokens emitted by a cycle of draft and verification, the verifier's included", color=INK)
    figure.supylabel("share of cycles", color=INK, fontsize=10)
    figure.suptitle("Acceptance length", color=INK, fontsize=13)
    add_note(figure, note)
    return save_png(figure)


def _draw_histogram(axes: Any, numbers: ModeNumbers, color: str) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    total = sum(numbers.acceptance_counts.values())
    shares = [count / total for count in numbers.acceptance_counts.values()]
    axes.bar(list(numbers.acceptance_counts), shares, width=0.8, color=color, zorder=3)
    axes.axvline(numbers.acceptance_length, color=INK, linewidth=1.2, linestyle=DASHES, zorder=4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def draw_thresholds(evaluation: Evaluation, note: str) -> bytes | None:
    """Draw agreement with AR, accuracy (if there are answers) and tokens per position over tokens per forward.

    Each mode is a line with a point per threshold. Returns a PNG, or None without a sweep.
    """
    lines = _sweep_lines(evaluation)
    if not lines:
        return None
    panels = [("agreement", "share of AR's tokens before the first difference"), ("accuracy", "accuracy")]
    shown = [panel for panel in panels if any(getattr(n, panel[0]) for line in lines.values() for _, n in line)]
    shown.append(("tokens_per_position", "tokens per computed position"))
    figure, axes = make_figure(1, len(shown), (5.2 * len(shown), 4.6))
    for panel, (what, label) in zip(axes[0], shown, strict=True):
        _draw_trade(panel, evaluation, lines, what)
        panel.set_xlabel("tokens per forward", color=INK)
        panel.set_ylabel(label, color=INK)
        style_axes(panel, grid="both")
    add_legend(figure, axes[0, 0], columns=len(lines) + 2)
    figure.suptitle("What thresholds trade (numbers at points)", color=INK, fontsize=13)
    add_note(figure, note)
    return save_png(figure)


def _draw_trade(axes: Any, evaluation: Evaluation, lines: dict[str, Line], what: str) -> None:
    """Draw one panel, with rates on logarithmic axes and shares on linear ones."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if AR in evaluation.overall.modes:
        ar = evaluation.overall.modes[AR]
        axes.scatter([ar.tokens_per_forward], [_read(ar, what)], marker="*", s=110, color=COLORS[AR], label=AR)
    if ceiling := evaluation.add_ceilings():
        axes.axvline(ceiling.tokens_per_forward, color=INK, linewidth=1.2, linestyle=DASHES, label="speed of light")
    apart = [name for name, line in lines.items() if line[0][0].is_lossless] if what != "tokens_per_position" else []
    for name, line in lines.items():
        # Lossless modes all give AR's text, so their lines would coincide.
        _draw_line(axes, name, line, what, points_down=3 * (1 + apart.index(name)) if name in apart else 0)
    if apart:
        axes.set_title("self-speculation is shifted down, line by line", fontsize=9, color=INK)
    scaled = [axes.xaxis, axes.yaxis] if what == "tokens_per_position" else [axes.xaxis]
    for axis in scaled:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.margins(x=0.12, y=0.12)
    if what != "tokens_per_position":
        axes.set_ylim(-0.06, 1.1)
    _label_thresholds(axes, lines, what)


def _sweep_lines(evaluation: Evaluation) -> dict[str, Line]:
    """Return a line per mode, with and without adapter, in the order of thresholds."""
    lines: dict[str, Line] = {}
    for variant in evaluation.swept_variants:
        lines.setdefault(variant.family, []).append((variant, evaluation.overall.modes[variant.name]))
    return {mode: sorted(line, key=lambda point: point[0].threshold or 0) for mode, line in lines.items()}


def _draw_line(axes: Any, name: str, line: Line, what: str, points_down: float) -> None:
    from matplotlib.transforms import ScaledTranslation

    points = [(numbers.tokens_per_forward, _read(numbers, what)) for _, numbers in line]
    moved = axes.transData + ScaledTranslation(0, -points_down / 72, axes.figure.dpi_scale_trans)
    look = {"color": COLORS[name], "marker": "o", "markersize": 4.5, "linewidth": 1.6, "label": name}
    axes.plot(*zip(*points, strict=True), transform=moved, **look)
    axes.update_datalim(points)


def _label_thresholds(axes: Any, lines: dict[str, Line], what: str) -> None:
    """Write thresholds next to their points where there is room.

    Lossless modes get none where only text is compared, since their text is AR's at every threshold.
    """
    taken: list[tuple[float, float]] = []
    for name, line in lines.items():
        if line[0][0].is_lossless and what != "tokens_per_position":
            continue
        for variant, numbers in line:
            point = (numbers.tokens_per_forward, _read(numbers, what))
            x, y = axes.transData.transform(point)
            if all(abs(x - other_x) > LABEL_PIXELS or abs(y - other_y) > LABEL_PIXELS for other_x, other_y in taken):
                taken.append((x, y))
                place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
                axes.annotate(f"{variant.threshold:g}", point, fontsize=8, color=COLORS[name], zorder=4, **place)


def _read(numbers: ModeNumbers, what: str) -> float:
    """Return the number that a panel shows; NaN if there is none."""
    if what == "tokens_per_position":
        return numbers.tokens_per_position
    if what == "agreement":
        return numbers.agreement.leading_share if numbers.agreement else math.nan
    return numbers.accuracy.share if numbers.accuracy else math.nan
