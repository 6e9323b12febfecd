"""One picture of the joint benchmark: speed-up against the floor, and memory."""

from pathlib import Path
from typing import Any


def plot_results(results: dict[str, Any], path: Path) -> None:
    """Two panels of bars by case, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = results["cases"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    allowed = [case["speed"]["speedup_allowed_by_floor"] for case in cases.values()]
    _draw_pairs(left, cases, allowed, [case["speed"]["speedup"] for case in cases.values()], "floor allows", "reached")
    left.set_title("Joint step: speed-up over the straightforward one")
    left.set_ylabel("times")
    straightforward, ours = (
        [case["memory"][side]["resident"] / 1e6 for case in cases.values()] for side in ("reference", "ours")
    )
    _draw_pairs(right, cases, straightforward, ours, "straightforward", "ours")
    right.set_title("Peak memory of a step, above weights and gradients")
    right.set_ylabel("MB")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_pairs(axes: Any, cases: Any, grey: list[float], blue: list[float], grey_name: str, blue_name: str) -> None:
    for offset, values, name, color in ((-0.2, grey, grey_name, "#bbbbbb"), (0.2, blue, blue_name, "#1f77b4")):
        bars = axes.bar([place + offset for place in range(len(values))], values, 0.38, label=name, color=color)
        axes.bar_label(bars, fmt="%.3g", fontsize=8)
    axes.set_xticks(range(len(cases)), list(cases), fontsize=8)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
