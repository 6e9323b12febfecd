"""The picture: tokens per forward without and with the adapter, and the gain with its interval, per group."""

import io
from typing import Any

from lora.evaluation.evaluate import Evaluation
from lora.evaluation.records import LINEAR, LINEAR_ADAPTER
from lora.evaluation.statistics import GroupNumbers

INK, MUTED, GRID, WITHOUT, WITH = "#22262b", "#6b7280", "#e5e7eb", "#94a3b8", "#2563eb"
INCHES_PER_GROUP, INCHES_AROUND, LABEL_CHARACTERS = 0.55, 1.9, 28


def draw_evaluation(evaluation: Evaluation) -> bytes:
    """PNG. Groups from top to bottom, all prompts last."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = dict(evaluation.groups)
    if len(rows) > 1:
        rows["all prompts"] = evaluation.overall
    size = (9.5, INCHES_AROUND + INCHES_PER_GROUP * len(rows))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=size, dpi=150, sharey=True, layout="constrained")
    groups = list(rows.values())
    _draw_rates(left, groups)
    _draw_gains(right, groups)
    left.set_yticks(range(len(rows)), [_shorten(name) for name in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    for axes in (left, right):
        _style(axes)
    figure.suptitle("Linear self-speculation: what the draft adapter gains", color=INK, fontsize=13)
    _add_legend(figure, left)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    pyplot.close(figure)
    return picture.getvalue()


def _draw_rates(axes: Any, groups: list[GroupNumbers]) -> None:
    """A pair of points per group, joined, with their values; greedy AR is the line at 1."""
    for mode, color, label in ((LINEAR, WITHOUT, "without adapter"), (LINEAR_ADAPTER, WITH, "with adapter")):
        rates = [group.modes[mode].tokens_per_forward for group in groups]
        axes.scatter(rates, range(len(groups)), color=color, s=48, zorder=3, label=label)
        for row, rate in enumerate(rates):
            _write(axes, f"{rate:.2f}", (rate, row), 8 if mode == LINEAR_ADAPTER else -14)
    for row, group in enumerate(groups):
        ends = [group.modes[mode].tokens_per_forward for mode in (LINEAR, LINEAR_ADAPTER)]
        axes.plot(ends, [row, row], color=GRID, linewidth=3, zorder=2, solid_capstyle="round")
    axes.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (5, 4)), label="AR")
    axes.margins(x=0.12)
    axes.set_xlabel("tokens per forward", color=INK)


def _draw_gains(axes: Any, groups: list[GroupNumbers]) -> None:
    """Points with their intervals and values; no gain is the line at 0."""
    for row, group in enumerate(groups):
        if group.interval is not None:
            axes.plot(group.interval, [row, row], color=WITH, linewidth=2, zorder=2)
        axes.scatter([group.gain_percent], [row], color=WITH, s=48, zorder=3)
        _write(axes, f"{group.gain_percent:+.1f}%", (group.gain_percent, row), 8)
    axes.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (5, 4)))
    axes.margins(x=0.12)
    axes.set_xlabel("gain in tokens per forward, % (95% interval)", color=INK)


def _write(axes: Any, text: str, point: tuple[float, float], points_above: int) -> None:
    """Over whatever lines pass there."""
    outline = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"}
    place = {"xytext": (0, points_above), "textcoords": "offset points", "ha": "center"}
    axes.annotate(text, point, fontsize=8.5, color=INK, bbox=outline, zorder=2.5, **place)


def _style(axes: Any) -> None:
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    for label in axes.get_yticklabels():
        label.set_color(INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _add_legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3, frameon=False, fontsize=9, labelcolor=INK)


def _shorten(name: str) -> str:
    return name if len(name) <= LABEL_CHARACTERS else name[: LABEL_CHARACTERS - 1] + "…"
