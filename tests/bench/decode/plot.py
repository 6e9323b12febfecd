"""Draws where each way to decode wins: the forwards and positions it needs, and its speed as forwards cost more."""

from collections.abc import Mapping
from typing import Any

from model.evaluate.picture_style import COLORS, DASHES, INK, MUTED, OUTLINE, make_figure, save_png, style_axes
from tests.bench.decode.analyse import pick
from tests.bench.decode.cost import RATIOS, compute_speedup

Figures = Mapping[str, Any]
BLOCK_STYLES = {None: "-", 8: DASHES, 4: (0, (1, 1.2))}  # by length of a block, None: the checkpoint's own


def draw_trained(results: Figures) -> bytes:
    """Draw tokens per forward over tokens per position, and speedup over AR over a / b; return a PNG."""
    figure, ((left, right),) = make_figure(1, 2, (14, 7.5))
    _draw_needs(left, results["by_setting"])
    _draw_speedups(right, results)
    title = (
        f"Fewer forwards or fewer positions: {results['num_prompts']} held-out prompts, greedy, output equal to AR's"
    )
    figure.suptitle(title, color=INK, fontsize=13)
    return save_png(figure)


def _add_legend(axes: Any) -> None:
    """Put the legend below the axes, since lines are everywhere in them."""
    place = {"loc": "upper left", "bbox_to_anchor": (0, -0.11), "ncols": 2, "fontsize": 7.5}
    axes.legend(frameon=False, labelcolor=INK, **place)


def _draw_needs(axes: Any, by_setting: Figures) -> None:
    for mode in ("linear", "quadratic"):
        for with_adapter in (False, True):
            chosen = pick(by_setting, mode=mode, with_adapter=with_adapter)
            if chosen:
                _draw_lines(axes, mode + ("+adapter" if with_adapter else ""), chosen)
    blocks = pick(by_setting, mode="block_diffusion")
    _connect(axes, blocks, COLORS["block_diffusion"], "block_diffusion, by threshold (lossy)", "D")
    _annotate(axes, blocks, lambda values: f"{values['threshold']:g}")
    axes.scatter([1], [1], marker="*", s=120, color=COLORS["ar"], label="ar", zorder=4)
    axes.set_xscale("log")
    axes.set_xlabel("tokens per computed position", color=INK)
    axes.set_ylabel("tokens per forward", color=INK)
    _add_legend(axes)
    style_axes(axes, grid="both")


def _draw_lines(axes: Any, family: str, chosen: list[dict[str, Any]]) -> None:
    """Draw a line over numbers of groups per block length (linear: over those lengths), and one over thresholds."""
    color = COLORS[family]
    plain = [values for values in chosen if values["threshold"] is None]
    if family.startswith("linear"):
        lines = {"by length of blocks": sorted(plain, key=lambda values: values["block_length"] or 99)}
        styles = [BLOCK_STYLES[4]]
    else:
        lines = {
            f"{f'block {length}' if length else 'full block'}, by groups": [
                v for v in plain if v["block_length"] == length
            ]
            for length in BLOCK_STYLES
        }
        styles = list(BLOCK_STYLES.values())
    for (label, line), style in zip(lines.items(), styles, strict=True):
        _connect(axes, line, color, f"{family}, {label}", "o", style)
        _annotate(axes, line, _say_groups if family.startswith("quadratic") else _say_block)
    whole = [v for v in chosen if v["block_length"] is None and v["mask_groups"] is None]
    _connect(axes, whole, color, f"{family}, by threshold", "x", linestyle="-", linewidth=0.5)


def _say_groups(values: Figures) -> str:
    return str(values["mask_groups"] or "all")


def _say_block(values: Figures) -> str:
    return f"block {values['block_length']}" if values["block_length"] else ""


def _connect(
    axes: Any,
    points: list[dict[str, Any]],
    color: str,
    label: str,
    marker: str,
    linestyle: Any = "-",
    linewidth: float = 1.3,
) -> None:
    x, y = [[values[key] for values in points] for key in ("tokens_per_position", "tokens_per_forward")]
    look = {"marker": marker, "markersize": 4.5, "color": color, "linestyle": linestyle, "linewidth": linewidth}
    axes.plot(x, y, label=label, **look)


def _annotate(axes: Any, points: list[dict[str, Any]], say: Any) -> None:
    for values in points:
        place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
        point = (values["tokens_per_position"], values["tokens_per_forward"])
        axes.annotate(say(values), point, fontsize=7, color=MUTED, **place)


def _draw_speedups(axes: Any, results: Figures) -> None:
    by_setting, cost = results["by_setting"], results["cost"]
    ar, *_ = pick(by_setting, mode="ar")
    has_adapter = any(values["with_adapter"] for values in by_setting.values())
    for values in pick(by_setting, threshold=None):
        is_default = values["block_length"] is None and values["mask_groups"] is None
        is_thrifty = values["block_length"] in (None, 4) and values["mask_groups"] == 1
        if not is_default and not (is_thrifty and values["with_adapter"] == has_adapter):
            continue
        family = values["mode"] + ("+adapter" if values["with_adapter"] else "")
        speedups = [compute_speedup(values, ratio) for ratio in RATIOS]
        style = "-" if is_default else BLOCK_STYLES[values["block_length"] or 8]
        axes.plot(RATIOS, speedups, color=COLORS[family], linestyle=style, linewidth=1.6, label=values["name"])
        measured = values["tokens_per_second"] / ar["tokens_per_second"]  # prefill and all else included
        axes.scatter([cost["ratio"]], [measured], color=COLORS[family], edgecolor=INK, s=28, zorder=4)
    best = [max(compute_speedup(values, ratio) for values in _lossless(by_setting)) for ratio in RATIOS]
    axes.plot(RATIOS, best, color=INK, linewidth=5, alpha=0.12, label="the fastest of all settings")
    axes.axvline(cost["ratio"], color=INK, linewidth=1, linestyle=DASHES)
    axes.annotate(
        f"this CPU, one thread: {cost['ratio']:.1f} (dots: measured)",
        (cost["ratio"], 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        color=INK,
        bbox=OUTLINE,
    )
    axes.set_xscale("log")
    axes.set_ylim(0)
    axes.set_xlabel("a / b: how many positions cost as much as the forward (a GPU at batch 1: hundreds)", color=INK)
    axes.set_ylabel("tokens per second, by AR's", color=INK)
    _add_legend(axes)
    style_axes(axes, grid="both")


def _lossless(by_setting: Figures) -> list[Figures]:
    return [values for values in by_setting.values() if values["mode"] != "block_diffusion"]
