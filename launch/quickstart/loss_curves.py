"""Read the losses that the training stages logged, and draw them over tokens in one picture."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.system.atomic import atomic_file
from conf.system.errors import UserError

SMOOTHING = 0.9  # weight of the past in the smoothed training curves
INK, MUTED, GRID = "#22262b", "#6b7280", "#e5e7eb"
COLORS = {"ar_loss": "#2563eb", "diffusion_loss": "#d97706"}
LABELS = {"ar_loss": "AR loss", "diffusion_loss": "diffusion loss"}
STAGE_TITLES = {"ar": "AR stage", "joint": "joint stage", "sft": "SFT (responses)"}
HEADROOM = 1.1  # of the y axis, for stage titles and legend


@dataclass
class StageCurves:
    """Holds the metrics.jsonl entries of one stage in the order of steps, training and held-out data apart."""

    stage: str
    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]


def load_curves(stage: str, run_dir: Path) -> StageCurves:
    """Read the metrics.jsonl of a run.

    Raises:
        UserError: The run has not written training and held-out losses.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: the {stage} stage has not run. Run the quickstart with --fresh.")
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    curves = StageCurves(stage, *([e for e in entries if e["kind"] == kind] for kind in ("train", "heldout")))
    if not curves.train or not curves.heldout:
        raise UserError(f"{path} lacks training or held-out losses: run the quickstart with --fresh.")
    return curves


def moving_average(values: list[float]) -> list[float]:
    """Return the exponential moving average, corrected for its start as Adam's is."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(average / weight)
    return smoothed


def draw_curves(stages: list[StageCurves], unigram_entropy: float, path: Path) -> None:
    """Draw losses (nats per token) over clean tokens as a PNG, one stage after the other on one axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5.6), dpi=150)
    first = 0.0
    for stage in stages:
        for name in LABELS:
            _draw_training(axes, *_points(stage.train, name, first), name)
            _draw_heldout(axes, *_points(stage.heldout, name, first), name)
        last = first + stage.train[-1]["tokens_seen"] / 1e6
        _mark_stage(axes, STAGE_TITLES.get(stage.stage, stage.stage), first, last)
        first = last
    _mark_unigram(axes, unigram_entropy, stages[0].train[-1]["tokens_seen"] / 1e6)
    _style(axes, first, [entry["ar_loss"] for stage in stages for entry in stage.heldout])
    _add_legend(axes)
    figure.tight_layout()
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
    pyplot.close(figure)


def _points(entries: list[dict[str, Any]], name: str, offset: float) -> tuple[list[float], list[float]]:
    """Return the entries that have this loss as millions of tokens since the first stage began, and losses."""
    with_loss = [entry for entry in entries if entry.get(name) is not None]
    return [offset + entry["tokens_seen"] / 1e6 for entry in with_loss], [entry[name] for entry in with_loss]


def _draw_training(axes: Any, tokens: list[float], losses: list[float], name: str) -> None:
    """Draw every step faintly and the moving average strongly."""
    if tokens:
        axes.plot(tokens, losses, color=COLORS[name], alpha=0.15, linewidth=0.8)
        label = f"{LABELS[name]}, training"
        axes.plot(tokens, moving_average(losses), color=COLORS[name], linewidth=1.8, label=label)


def _draw_heldout(axes: Any, tokens: list[float], losses: list[float], name: str) -> None:
    """Draw a ring per evaluation, and the value of the last one."""
    from matplotlib.patheffects import withStroke

    if not tokens:
        return
    style = {"marker": "o", "markersize": 6, "markerfacecolor": "white", "markeredgewidth": 1.6, "linewidth": 0}
    label = f"{LABELS[name]}, held-out"
    axes.plot(tokens, losses, color=COLORS[name], label=label, zorder=5, clip_on=False, **style)
    axes.annotate(
        f"{losses[-1]:.2f}",
        (tokens[-1], losses[-1]),
        xytext=(-4, 9),
        textcoords="offset points",
        ha="right",
        color=COLORS[name],
        fontsize=9,
        weight="bold",
        path_effects=[withStroke(linewidth=3, foreground="white")],  # legible on top of a curve
        zorder=6,
    )


def _mark_stage(axes: Any, title: str, first: float, last: float) -> None:
    if first:
        axes.axvline(first, color=MUTED, linewidth=1)
    place = ((first + last) / 2, 0.97)
    axes.annotate(title, place, xycoords=("data", "axes fraction"), ha="center", va="top", color=MUTED, fontsize=10)


def _mark_unigram(axes: Any, unigram_entropy: float, end_of_first_stage: float) -> None:
    """Label the line where the first stage ends: its losses are far below by then, the next ones not yet above."""
    axes.axhline(unigram_entropy, color=MUTED, linewidth=1, linestyle=(0, (5, 4)))
    text = f"unigram entropy {unigram_entropy:.2f}"
    style = {"textcoords": "offset points", "ha": "right", "color": MUTED, "fontsize": 9}
    axes.annotate(text, (end_of_first_stage, unigram_entropy), xytext=(-4, 4), **style)


def _style(axes: Any, last: float, heldout_losses: list[float]) -> None:
    axes.set_title("Quickstart: losses over the stages", loc="left", color=INK, fontsize=13, pad=12)
    axes.set_xlabel("clean tokens trained on (millions)", color=INK)
    axes.set_ylabel("nats per token", color=INK)
    axes.set_xlim(0, last)
    axes.set_ylim(0.7 * min(heldout_losses), HEADROOM * max(heldout_losses))
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)


def _add_legend(axes: Any) -> None:
    """Show each label once, although several stages draw it."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    # Above the middle of the curves, because losses are high at both ends of a stage.
    place = {"loc": "upper center", "bbox_to_anchor": (0.61, 0.93), "frameon": False, "ncols": 2}
    axes.legend(unique.values(), unique.keys(), fontsize=9, labelcolor=INK, **place)
