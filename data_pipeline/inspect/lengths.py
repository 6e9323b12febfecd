"""Count how long documents are, exactly and in memory that does not grow with their number, and draw the counts."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.system.atomic import atomic_write_bytes
from conf.system.errors import UserError
from data_pipeline.storage.tokens import StoredTokens

DOCUMENTS_PER_CHUNK = 1 << 18

INK, MUTED, GRID = "#22262b", "#6b7280", "#e5e7eb"
COLOURS = {"document": "#2563eb", "prompt": "#6b7280", "response": "#059669"}
SEQUENCE_COLOUR = "#d97706"
NUM_BINS = 40
PANEL_INCHES = 2.3


@dataclass(frozen=True)
class LengthCounts:
    """Says how often each length occurs. lengths: [n] distinct lengths in tokens, ascending. counts: [n].

    n distinct lengths need n^2 / 2 tokens, so those of 10^12 tokens fit in 25 MB.
    """

    lengths: np.ndarray
    counts: np.ndarray

    @property
    def total(self) -> int:
        """Return the number of lengths."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Return the mean length in tokens."""
        return float(self.lengths @ self.counts) / self.total

    def quantile(self, share: float) -> int:
        """Return the smallest length that at least `share` (0..1) of all do not exceed."""
        return int(self.lengths[np.searchsorted(np.cumsum(self.counts), share * self.total)])

    def add(self, lengths: np.ndarray) -> "LengthCounts":
        """Return the counts with more lengths added."""
        new, counts = np.unique(lengths, return_counts=True)
        both, places = np.unique(np.concatenate([self.lengths, new]), return_inverse=True)
        totals = np.zeros(len(both), dtype=np.int64)
        np.add.at(totals, places, np.concatenate([self.counts, counts]))
        return LengthCounts(both, totals)


def count_lengths(stored: StoredTokens) -> dict[str, LengthCounts]:
    """Return the lengths of each `document`, and in chats of each `prompt` and `response`."""
    names = ("document", "prompt", "response") if stored.kind.is_chat else ("document",)
    none = np.zeros(0, dtype=np.int64)
    counts = {name: LengthCounts(none, none) for name in names}
    for number in range(stored.num_shards):
        shard = stored.open_shard(number)
        for first in range(0, shard.num_documents, DOCUMENTS_PER_CHUNK):
            end = min(first + DOCUMENTS_PER_CHUNK, shard.num_documents)
            lengths = [shard.document_lengths(first, end)]
            if stored.kind.is_chat:
                bounds = shard.segment_bounds(first, end)
                segments = shard.segment_lengths(bounds[0], bounds[-1])
                lengths += [segments[::2], segments[1::2]]
            counts = {name: counts[name].add(more) for name, more in zip(names, lengths, strict=True)}
    return counts


def draw_lengths(lengths: dict[str, LengthCounts], title: str, sequence_length: int, path: Path) -> None:
    """Write a PNG with one panel per kind of length over a shared logarithmic axis.

    sequence_length: of a training sequence, for comparison. Raises UserError if the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 1.4 + PANEL_INCHES * len(lengths)
    figure, panels = pyplot.subplots(len(lengths), sharex=True, squeeze=False, figsize=(9, height), dpi=150)
    edges = _choose_edges(list(lengths.values()))
    for axes, (name, counts) in zip(panels[:, 0], lengths.items(), strict=True):
        _draw_panel(axes, name, counts, edges, sequence_length)
    panels[0, 0].set_title(title, loc="left", color=INK, fontsize=12, pad=22)
    panels[-1, 0].set_xlabel("length in tokens", color=INK)
    figure.tight_layout()
    png = io.BytesIO()
    figure.savefig(png, format="png")
    pyplot.close(figure)
    try:
        atomic_write_bytes(path, png.getvalue())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def _choose_edges(counts: list[LengthCounts]) -> np.ndarray:
    """Return the edges of bins of about equal width on the axis; they lie between integers."""
    shortest, longest = min(int(c.lengths[0]) for c in counts), max(int(c.lengths[-1]) for c in counts)
    return np.unique(np.geomspace(max(shortest, 1), longest + 1, NUM_BINS + 1).round()) - 0.5


def _draw_panel(axes: Any, name: str, counts: LengthCounts, edges: np.ndarray, sequence_length: int) -> None:
    heights, _ = np.histogram(counts.lengths, bins=edges, weights=counts.counts)
    axes.stairs(heights, edges, fill=True, color=COLOURS[name], alpha=0.85)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.05 * heights.max())
    axes.set_ylabel(f"{name}s", color=INK)
    for label, share, side in (("median", 0.5, "right"), ("p95", 0.95, "left")):
        length = counts.quantile(share)
        axes.axvline(length, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        _label(axes, length, f" {label} {length:,} ", ha=side, va="bottom", color=INK)
    if edges[0] <= sequence_length <= edges[-1]:
        axes.axvline(sequence_length, color=SEQUENCE_COLOUR, linewidth=1)
        style = {"rotation": 90, "color": SEQUENCE_COLOUR, "bbox": {"color": "white", "alpha": 0.8, "pad": 1}}
        _label(axes, sequence_length, f"sequence {sequence_length:,} ", ha="right", va="top", **style)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.get_major_locator().set_params(integer=True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _label(axes: Any, length: int, text: str, **style: Any) -> None:
    """Write text where the line at `length` meets the top of the panel."""
    axes.annotate(text, (length, 1), xycoords=("data", "axes fraction"), fontsize=8, **style)
