"""One picture of the joint benchmark: speed-up against the floor, and memory."""

from pathlib import Path
from typing import Any

from conf.system.atomic import atomic_file


def plot_results(results: dict[str, Any], path: Path) -> None:
    """Draw two panels of bars by case into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = results["cases"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    allowed = [case["speed"]["speedup_allowed_by_floor"] for case in cases.values()]
    reached = [case["speed"]["speedup"] for case in cases.values()]
    _draw_bars(left, cases, "%.2f", {"floor allows": allowed, "reached": reached})
    left.set_title("Joint step: speed-up over the straightforward one")
    left.set_ylabel("times")
    straightforward, ours = (
        [case["memory"][side]["resident"] / 1e6 for case in cases.values()] for side in ("reference", "ours")
    )
    _draw_bars(right, cases, "%.0f", {"straightforward": straightforward, "ours": ours})
    right.set_title("Peak memory of a step, above weights and gradients")
    right.set_ylabel("MB")
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)


def _draw_bars(axes: Any, cases: Any, number: str, pair: dict[str, list[float]]) -> None:
    for offset, color, (name, values) in zip((-0.2, 0.2), ("#bbbbbb", "#1f77b4"), pair.items(), strict=True):
        bars = axes.bar([place + offset for place in range(len(values))], values, 0.38, label=name, color=color)
        axes.bar_label(bars, fmt=number, fontsize=8)
    axes.set_xticks(range(len(cases)), list(cases), fontsize=8)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
