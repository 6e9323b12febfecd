"""The picture of an evaluation: tokens per forward without and with the adapter, and the gain, per group."""

from typing import Any

from lora.evaluate.gain import DrafterEvaluation, GroupGain
from model.evaluate.picture_style import (
    DASHES,
    GRID,
    INK,
    MUTED,
    add_legend,
    label_from_top,
    make_figure,
    save_png,
    style_axes,
    write,
)
from model.evaluate.variants import LINEAR_ADAPTER
from model.hf.options import LINEAR

_WITHOUT, _WITH = "#94a3b8", "#2563eb"
_INCHES_PER_GROUP, _INCHES_AROUND = 0.55, 1.9


def draw_gain(evaluation: DrafterEvaluation) -> bytes:
    """Return a PNG with the groups from top to bottom and all prompts last."""
    named = dict(evaluation.groups)
    if len(named) > 1:
        named["all prompts"] = evaluation.overall
    size = (9.5, _INCHES_AROUND + _INCHES_PER_GROUP * len(named))
    figure, ((left, right),) = make_figure(1, 2, size, sharey=True)
    groups = list(named.values())
    _draw_rates(left, groups)
    _draw_gains(right, groups)
    label_from_top(left, list(named))
    for axes in (left, right):
        style_axes(axes)
    figure.suptitle("Linear self-speculation: what the draft adapter gains", color=INK, fontsize=13)
    add_legend(figure, left, columns=3)
    return save_png(figure)


def _draw_rates(axes: Any, groups: list[GroupGain]) -> None:
    """Draw two points per group, joined, with their values; greedy AR is the line at 1."""
    for mode, color, label in ((LINEAR, _WITHOUT, "without adapter"), (LINEAR_ADAPTER, _WITH, "with adapter")):
        rates = [group.modes[mode].tokens_per_forward for group in groups]
        axes.scatter(rates, range(len(groups)), color=color, s=48, zorder=3, label=label)
        for place, rate in enumerate(rates):
            write(axes, f"{rate:.2f}", (rate, place), 8 if mode == LINEAR_ADAPTER else -14)
    for place, group in enumerate(groups):
        ends = [group.modes[mode].tokens_per_forward for mode in (LINEAR, LINEAR_ADAPTER)]
        axes.plot(ends, [place, place], color=GRID, linewidth=3, zorder=2, solid_capstyle="round")
    axes.axvline(1, color=MUTED, linewidth=1, linestyle=DASHES, label="AR")
    axes.margins(x=0.12)
    axes.set_xlabel("tokens per forward", color=INK)


def _draw_gains(axes: Any, groups: list[GroupGain]) -> None:
    """Draw a point per group with its interval and value; no gain is the line at 0."""
    for place, group in enumerate(groups):
        if group.interval is not None:
            axes.plot(group.interval, [place, place], color=_WITH, linewidth=2, zorder=2)
        axes.scatter([group.gain_percent], [place], color=_WITH, s=48, zorder=3)
        write(axes, f"{group.gain_percent:+.1f}%", (group.gain_percent, place), 8)
    axes.axvline(0, color=MUTED, linewidth=1, linestyle=DASHES)
    axes.margins(x=0.12)
    axes.set_xlabel("gain in tokens per forward, % (95% interval)", color=INK)
