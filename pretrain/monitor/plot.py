"""Draws a run: losses, learning rate, speed and gradient norm over tokens, with restarts and events."""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from conf.system.atomic import atomic_file
from pretrain.monitor.history import Columns, History
from pretrain.monitor.text import format_count

matplotlib.use("Agg")

INK, MUTED, GRID = "#22262b", "#6b7280", "#e5e7eb"
LOSS_COLORS = {"ar_loss": "#2563eb", "diffusion_loss": "#d97706", "loss": "#475569", "acceptance_length": "#059669"}
LOSS_LABELS = {
    "ar_loss": "AR loss",
    "diffusion_loss": "diffusion loss",
    "loss": "optimised loss",
    "acceptance_length": "acceptance length",
}
CURVE_LABELS = {*LOSS_LABELS.values(), "held-out"}
EVENT_STYLES = {  # of what happened to the training; the rest of the events is grey
    "spike": ("#dc2626", "v"),
    "nonfinite": ("#7c3aed", "X"),
    "rollback": ("#dc2626", "<"),
    "save_failed": ("#ea580c", "s"),
    "corrupt_checkpoint": ("#ea580c", "D"),
}
OTHER_STYLE = ("#6b7280", "o")
PANELS = (("lr", "learning rate"), ("tokens_per_second", "tokens per second"), ("grad_norm", "gradient norm"))
POINTS = 1200  # drawn per curve; more are put into bins
SMOOTH_SHARE = 0.02  # of a curve, the width of its moving average
RING: dict[str, Any] = {"marker": "o", "markersize": 5, "markerfacecolor": "white", "linewidth": 0}
WIDE_FACTOR = 20.0  # between median and maximum of a positive quantity, above which its axis is logarithmic
OUTLIERS = 3.0  # percent of the points at the top that the loss axis need not show


def draw_run(history: History, title: str, path: Path) -> None:
    """Write a PNG of whatever is known so far. Raises: OSError if it cannot be written."""
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12, 7.6), dpi=130, layout="constrained")
    grid = figure.add_gridspec(2, len(PANELS), height_ratios=(1.7, 1))
    scale, unit = choose_unit(history)
    losses = figure.add_subplot(grid[0, :])
    _draw_losses(losses, history, scale)
    panels = [figure.add_subplot(grid[1, number]) for number in range(len(PANELS))]
    for axes, (name, label) in zip(panels, PANELS, strict=True):
        _draw_panel(axes, history.train, name, label, scale)
    for axes in (losses, *panels):
        _style(axes, f"clean tokens{unit}")
        _mark_restarts(axes, history, scale)
    _mark_events(losses, history, scale)
    _add_legend(losses)
    losses.set_title(title, loc="left", color=INK, fontsize=13, pad=22)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
    pyplot.close(figure)


def choose_unit(history: History) -> tuple[float, str]:
    """Return (tokens per unit of the x axis, what the axis adds to its label)."""
    last = max([*history.train["tokens_seen"][-1:], *history.heldout["tokens_seen"][-1:]], default=0.0)
    for size, name in ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if last >= size:
            return size, f" ({name})"
    return 1.0, ""


@dataclass(frozen=True)
class Curve:
    """Holds x, y: means of bins of points; low, high: extremes within each, so that outliers still show."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


def thin(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> Curve:
    """Return the points whose y is known, in order, in at most `points` bins."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= points:
        return Curve(x, y, y, y)
    starts = np.arange(points) * len(x) // points
    sizes = np.diff(starts, append=len(x))
    mean_x, mean_y = np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes
    return Curve(mean_x, mean_y, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts))


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the centred moving average over SMOOTH_SHARE of the curve; narrower at its ends."""
    width = max(1, int(SMOOTH_SHARE * len(values)))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    reach = np.minimum(np.minimum(places, len(values) - 1 - places), width)
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def _points(columns: Columns, name: str, scale: float) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(columns["tokens_seen"]) / scale, np.asarray(columns[name])


def _draw_losses(axes: Any, history: History, scale: float) -> None:
    """Draw training faint, its average strong, held-out as rings with the last value written.

    AR's own loss is shown once: in an AR stage it is the optimised one too.
    """
    names = [name for name in LOSS_COLORS if history.train.has(name) or history.heldout.has(name)]
    if "ar_loss" in names and "diffusion_loss" not in names:
        names.remove("loss")
    shown: list[np.ndarray] = []
    for name in names:
        color = LOSS_COLORS[name]
        curve = thin(*_points(history.train, name, scale))
        if len(curve.x):
            _draw_curve(axes, curve, color, LOSS_LABELS[name])
            shown.append(curve.y)
        heldout = thin(*_points(history.heldout, name, scale), points=60)
        if len(heldout.x) and name != "loss":
            _draw_heldout(axes, heldout, color)
            shown.append(heldout.y)
    if history.heldout:
        axes.plot([], [], color=MUTED, label="held-out", **RING)
    axes.set_ylabel("nats per token" if "ar_loss" in names else "", color=INK)
    _limit(axes, shown)


def _draw_curve(axes: Any, curve: Curve, color: str, label: str | None = None) -> None:
    """Draw every step faint and their moving average strong."""
    if np.array_equal(curve.low, curve.high):
        axes.plot(curve.x, curve.y, color=color, alpha=0.2, linewidth=0.8)
    else:
        axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
    axes.plot(curve.x, smooth(curve.y), color=color, linewidth=1.7, label=label)


def _draw_heldout(axes: Any, curve: Curve, color: str) -> None:
    axes.plot(curve.x, curve.y, color=color, zorder=5, **RING)
    place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
    axes.annotate(f"{curve.y[-1]:.3f}", (curve.x[-1], curve.y[-1]), color=color, fontsize=9, weight="bold", **place)


def _limit(axes: Any, shown: list[np.ndarray]) -> None:
    """Cut off a few outliers at the top, as of first steps or spikes, which would flatten everything else."""
    if not shown:
        return
    everything = np.concatenate(shown)
    low, high = everything.min(), np.percentile(everything, 100 - OUTLIERS)
    margin = 0.06 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)


def _draw_panel(axes: Any, train: Columns, name: str, label: str, scale: float) -> None:
    curve = thin(*_points(train, name, scale))
    axes.set_title(label, loc="left", color=INK, fontsize=10)
    if not len(curve.x):
        axes.annotate("not recorded", (0.5, 0.5), xycoords="axes fraction", ha="center", color=MUTED)
        return
    if name == "lr":
        axes.plot(curve.x, curve.y, color=INK, linewidth=1.5)
    else:
        _draw_curve(axes, curve, INK)
    if name == "grad_norm" and curve.low.min() > 0 and curve.high.max() > WIDE_FACTOR * np.median(curve.y):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: format_count(value) if value >= 1e3 else f"{value:g}")


def _mark_restarts(axes: Any, history: History, scale: float) -> None:
    for number, line in enumerate(history.restores):
        label = None if number else "restart"
        place = line.get("tokens_seen", 0) / scale
        axes.axvline(place, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label=label)


def _mark_events(axes: Any, history: History, scale: float) -> None:
    """Draw symbols above the losses; what they mean stands beside the title, with the restarts."""
    marks = [line for line in axes.lines if line.get_label() == "restart"]
    ordered = sorted(history.events, key=lambda line: str(line.get("event")))
    for kind, lines in groupby(ordered, key=lambda line: str(line.get("event"))):
        color, marker = EVENT_STYLES.get(kind, OTHER_STYLE)
        places = [line.get("tokens_seen", 0) / scale for line in lines]
        style = {"marker": marker, "color": color, "linewidth": 0, "markersize": 7, "clip_on": False, "zorder": 6}
        height = np.full(len(places), 1.03)
        label = kind.replace("_", " ")
        marks += axes.plot(places, height, transform=axes.get_xaxis_transform(), label=label, **style)
    if marks:
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.04), "ncols": len(marks)}
        axes.add_artist(axes.legend(handles=marks, frameon=False, fontsize=9, labelcolor=INK, **place))


def _style(axes: Any, label: str) -> None:
    axes.set_xlabel(label, color=MUTED, fontsize=9)
    axes.margins(x=0.01)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)


def _add_legend(axes: Any) -> None:
    """Add a legend of the curves, without what _mark_events has explained."""
    handles, labels = axes.get_legend_handles_labels()
    curves = {label: handle for label, handle in zip(labels, handles, strict=True) if label in CURVE_LABELS}
    if curves:
        place = {"loc": "upper right", "ncols": len(curves)}
        axes.legend(curves.values(), curves.keys(), frameon=False, fontsize=9, labelcolor=INK, **place)
