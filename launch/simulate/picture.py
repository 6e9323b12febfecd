"""Draw live bytes of simulated ranks over a step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from conf.system.atomic import atomic_file
from launch.simulate.rank_report import GIB, STATIC, RankReport, Recording

matplotlib.use("Agg")

COLORS = {"weights": "#475569", "adapter": "#64748b", "gradients": "#94a3b8", "optimizer": "#cbd5e1"}
PASSING, INK, MUTED = "#2563eb", "#22262b", "#6b7280"


def draw_memory(reports: Sequence[RankReport], path: Path) -> None:
    """Write a PNG with a panel per rank: what outlives the step as bands, the rest above. Raises: OSError."""
    from matplotlib import pyplot

    drawn = [report for report in reports if report.step is not None]
    if not drawn:
        return
    figure, panels = pyplot.subplots(
        len(drawn), 1, figsize=(11, 1.2 + 2.6 * len(drawn)), dpi=130, layout="constrained", squeeze=False, sharey=True
    )
    for axes, report in zip(panels[:, 0], drawn, strict=True):
        assert report.step is not None
        _draw_step(axes, report.step)
        axes.set_title(f"rank {report.rank} of {len(report.groups['world'])}", loc="left", color=INK, fontsize=11)
    panels[-1, 0].set_xlabel("the step, in the order in which tensors come and go", color=MUTED)
    panels[0, 0].legend(loc="upper right", frameon=False, fontsize=9, ncols=4)
    panels[0, 0].margins(y=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")
    pyplot.close(figure)


def _draw_step(axes: Any, step: Recording) -> None:
    x, floor = range(len(step.course)), 0.0
    for kind in (kind for kind in STATIC if kind in step.kinds):
        top = floor + step.kinds.get(kind, 0) / GIB
        axes.fill_between(x, floor, top, color=COLORS[kind], linewidth=0, label=kind)
        floor = top
    course = [value / GIB for value in step.course]
    axes.fill_between(x, floor, course, color=PASSING, alpha=0.55, linewidth=0, label="activations and the rest")
    highest = max(x, key=course.__getitem__)
    axes.plot([highest], [course[highest]], marker="o", color=INK, markersize=4)
    where = " ".join(filter(None, (step.peak_at.phase, step.peak_at.module)))
    side = "right" if highest > len(course) / 2 else "left"
    axes.annotate(
        f"{course[highest]:.2f} GiB  {where}",
        (highest, course[highest]),
        textcoords="offset points",
        xytext=(-6 if side == "right" else 6, 5),
        ha=side,
        color=INK,
        fontsize=9,
    )
    axes.set_ylabel("GiB", color=MUTED)
    axes.set_ylim(bottom=0)
    axes.set_xticks([])
    axes.spines[["top", "right"]].set_visible(False)
