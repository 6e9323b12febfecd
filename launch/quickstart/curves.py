"""What the training stages wrote: losses over tokens, in memory and as a picture."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import UserError

SMOOTHING = 0.93  # weight of the past in the drawn training curves
INK, MUTED, GRID = "#22262b", "#6b7280", "#e5e7eb"
COLORS = {"ar_loss": "#2563eb", "diffusion_loss": "#d97706"}
LABELS = {"ar_loss": "AR loss", "diffusion_loss": "diffusion loss"}


@dataclass
class StageCurves:
    """Lines of metrics.jsonl of one stage, in the order of steps: those of training and those of held-out data."""

    stage: str
    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]


def load_curves(stage: str, run_dir: Path) -> StageCurves:
    """Raises UserError if the run has not written training and held-out losses."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: the {stage} stage has not run. Run the quickstart with --fresh.")
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    curves = StageCurves(stage, *([e for e in entries if e["kind"] == kind] for kind in ("train", "heldout")))
    if not curves.train or not curves.heldout:
        raise UserError(f"{path} lacks training or held-out losses: run the quickstart with --fresh.")
    return curves


def draw_curves(stages: list[StageCurves], unigram_entropy: float, path: Path) -> None:
    """PNG of AR and diffusion losses (nats per token), training and held-out, over the tokens of all stages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5.6), dpi=150)
    offset = 0.0
    for stage in stages:
        for name in LABELS:
            _draw_stage(axes, stage, name, offset)
        first, offset = offset, offset + stage.train[-1]["tokens_seen"] / 1e6
        _mark_stage(axes, stage.stage, first, offset)
    axes.axhline(unigram_entropy, color=MUTED, linewidth=1, linestyle=(0, (5, 4)))
    axes.annotate(
        f"unigram entropy {unigram_entropy:.2f}",
        (offset, unigram_entropy),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color=MUTED,
        fontsize=9,
    )
    _style(axes, offset, unigram_entropy)
    figure.tight_layout()
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png")
    pyplot.close(figure)
    partial.replace(path)


def _draw_stage(axes: Any, stage: StageCurves, name: str, offset: float) -> None:
    """Faint raw and strong smoothed training losses, held-out losses as ringed dots."""
    for kind, entries in (("train", stage.train), ("heldout", stage.heldout)):
        points = [(offset + e["tokens_seen"] / 1e6, e[name]) for e in entries if e.get(name) is not None]
        if not points:
            continue
        tokens, losses = zip(*points, strict=True)
        if kind == "train":
            axes.plot(tokens, losses, color=COLORS[name], alpha=0.15, linewidth=0.8)
            axes.plot(
                tokens, smooth(list(losses)), color=COLORS[name], linewidth=1.8, label=f"{LABELS[name]}, training"
            )
        else:
            style = {"marker": "o", "markersize": 6, "markerfacecolor": "white", "markeredgewidth": 1.6}
            label = f"{LABELS[name]}, held-out"
            axes.plot(tokens, losses, color=COLORS[name], linewidth=0, label=label, zorder=5, **style)
            text = {"textcoords": "offset points", "ha": "right", "fontsize": 9}
            axes.annotate(
                f"{losses[-1]:.2f}", (tokens[-1], losses[-1]), xytext=(-2, 9), color=COLORS[name], weight="bold", **text
            )


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average, corrected for its start as Adam's is."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(average / weight)
    return smoothed


def _mark_stage(axes: Any, stage: str, first: float, last: float) -> None:
    if first:
        axes.axvline(first, color=MUTED, linewidth=1)
    middle = (first + last) / 2
    place = {"xycoords": ("data", "axes fraction"), "ha": "center", "color": MUTED, "fontsize": 10}
    axes.annotate(f"{stage} stage", (middle, 0.97), va="top", **place)


def _style(axes: Any, num_tokens: float, unigram_entropy: float) -> None:
    axes.set_title("Quickstart: losses over both stages", loc="left", color=INK, fontsize=13, pad=12)
    axes.set_xlabel("clean tokens trained on (millions)", color=INK)
    axes.set_ylabel("nats per token", color=INK)
    axes.set_xlim(0, num_tokens)
    axes.set_ylim(bottom=1, top=unigram_entropy * 1.5)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(
        unique.values(), unique.keys(), frameon=False, fontsize=9, ncols=2, loc="upper right", bbox_to_anchor=(1, 0.93)
    )
