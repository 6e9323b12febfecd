"""The picture: tokens per forward without and with the adapter, and the gain with its interval, per group."""

from typing import Any

from lora.evaluate.run import DrafterEvaluation
from lora.evaluate.statistics import GroupGain
from model.commands.modes import LINEAR_ADAPTER
from model.evaluate.picture_style import (
    DASHES,
    GRID,
    INK,
    MUTED,
    add_legend,
    label_rows,
    make_figure,
    save_png,
    style_axes,
    write,
)
from model.hf.options import LINEAR

WITHOUT, WITH = "#94a3b8", "#2563eb"
INCHES_PER_GROUP, INCHES_AROUND = 0.55, 1.9


def draw_evaluation(evaluation: DrafterEvaluation) -> bytes:
    """PNG. Groups from top to bottom, all prompts last."""
    rows = dict(evaluation.groups)
    if len(rows) > 1:
        rows["all prompts"] = evaluation.overall
    size = (9.5, INCHES_AROUND + INCHES_PER_GROUP * len(rows))
    figure, ((left, right),) = make_figure(1, 2, size, sharey=True)
    groups = list(rows.values())
    _draw_rates(left, groups)
    _draw_gains(right, groups)
    label_rows(left, list(rows))
    for axes in (left, right):
        style_axes(axes)
    figure.suptitle("Linear self-speculation: what the draft adapter gains", color=INK, fontsize=13)
    add_legend(figure, left, columns=3)
    return save_png(figure)


def _draw_rates(axes: Any, groups: list[GroupGain]) -> None:
    """A pair of points per group, joined, with their values; greedy AR is the line at 1."""
    for mode, color, label in ((LINEAR, WITHOUT, "without adapter"), (LINEAR_ADAPTER, WITH, "with adapter")):
        rates = [group.modes[mode].tokens_per_forward for group in groups]
        axes.scatter(rates, range(len(groups)), color=color, s=48, zorder=3, label=label)
        for row, rate in enumerate(rates):
            write(axes, f"{rate:.2f}", (rate, row), 8 if mode == LINEAR_ADAPTER else -14)
    for row, group in enumerate(groups):
        ends = [group.modes[mode].tokens_per_forward for mode in (LINEAR, LINEAR_ADAPTER)]
        axes.plot(ends, [row, row], color=GRID, linewidth=3, zorder=2, solid_capstyle="round")
    axes.axvline(1, color=MUTED, linewidth=1, linestyle=DASHES, label="AR")
    axes.margins(x=0.12)
    axes.set_xlabel("tokens per forward", color=INK)


def _draw_gains(axes: Any, groups: list[GroupGain]) -> None:
    """Points with their intervals and values; no gain is the line at 0."""
    for row, group in enumerate(groups):
        if group.interval is not None:
            axes.plot(group.interval, [row, row], color=WITH, linewidth=2, zorder=2)
        axes.scatter([group.gain_percent], [row], color=WITH, s=48, zorder=3)
        write(axes, f"{group.gain_percent:+.1f}%", (group.gain_percent, row), 8)
    axes.axvline(0, color=MUTED, linewidth=1, linestyle=DASHES)
    axes.margins(x=0.12)
    axes.set_xlabel("gain in tokens per forward, % (95% interval)", color=INK)
