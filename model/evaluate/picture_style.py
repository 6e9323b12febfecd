"""The common look of evaluation pictures."""

import io
from collections.abc import Sequence
from typing import Any

INK, MUTED, GRID = "#22262b", "#6b7280", "#e5e7eb"
# By the variant's name; the adapter darkens a mode's colour.
COLORS = {
    "ar": MUTED,
    "block_diffusion": "#d97706",
    "linear": "#7aa7f7",
    "linear+adapter": "#1d4ed8",
    "quadratic": "#6ec6a0",
    "quadratic+adapter": "#0f7a4d",
}
DASHES = (0, (5, 4))
OUTLINE = {
    "boxstyle": "round,pad=0.1",
    "facecolor": "white",
    "edgecolor": "none",
}  # text over lines
LABEL_CHARACTERS = 28


def make_figure(num_down: int, num_across: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """Make a figure and an array of axes [num_down, num_across]; size is in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(num_down, num_across, figsize=size, dpi=150, layout="constrained", squeeze=False, **options)


def save_png(figure: Any) -> bytes:
    """Return the figure as PNG bytes and close it."""
    from matplotlib import pyplot

    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    pyplot.close(figure)
    return picture.getvalue()


def style_axes(axes: Any, *, grid: str = "x") -> None:
    """Draw a light grid and only the bottom line of the frame. grid: x, y or both."""
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    for label in axes.get_yticklabels():
        label.set_color(INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def label_from_top(axes: Any, names: Sequence[str]) -> None:
    """Label the vertical axis with names from top to bottom at 0, 1, ..."""
    axes.set_yticks(range(len(names)), [shorten(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def write(axes: Any, text: str, point: tuple[float, float], points_above: int) -> None:
    """Write text above a point, covering the lines there."""
    place = {"xytext": (0, points_above), "textcoords": "offset points", "ha": "center"}
    axes.annotate(text, point, fontsize=8.5, color=INK, bbox=OUTLINE, zorder=2.5, **place)


def add_legend(figure: Any, axes: Any, columns: int) -> None:
    """Put a legend of the labels of `axes` below the picture."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=9, labelcolor=INK)


def add_note(figure: Any, note: str) -> None:
    """Put small print below the picture."""
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color=MUTED)


def shorten(name: str) -> str:
    """Cut a name to at most LABEL_CHARACTERS."""
    return name if len(name) <= LABEL_CHARACTERS else name[: LABEL_CHARACTERS - 1] + "…"
