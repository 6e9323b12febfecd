"""Print recommended layouts of the recipes: `python -m launch.plan.recommend`.

A row per size, stage and number of H100: the layout that the search ranks first, what is predicted for it, and the
overrides by which the recipe gets it. Days and MFU follow from the assumed MFU of HardwareProfile; nothing is measured.
"""

import sys
from collections.abc import Iterator
from itertools import product

from conf.composition.compose import compose_size
from conf.schema import RunConfig
from conf.system.entry import OneLineParser, exit_status
from launch.plan.hardware_profile import GIGA, HardwareProfile
from launch.plan.layout_plan import LayoutPlan, list_overrides
from launch.plan.search import search_layouts

SIZES, STAGES, GPUS = ("3b", "8b", "14b"), ("ar", "joint"), (8, 64, 256)
COLUMNS = ("recipe", "H100", "layout", "GB per GPU", "s per step", "days", "MFU", "overrides of the recipe")


def main() -> None:
    """Print a Markdown table."""
    parser = OneLineParser(prog="python -m launch.plan.recommend", description=__doc__)
    parser.parse_args()
    print("\n".join(build_table()))


def build_table() -> list[str]:
    """Return the lines of the table."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *_describe_recipes()]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _describe_recipes() -> Iterator[tuple[str, ...]]:
    for size, stage, num_gpus in product(SIZES, STAGES, GPUS):
        name = f"nld_{size}_{stage}"
        recipe = compose_size([f"experiment={name}"])
        yield name, str(num_gpus), *_describe(recommend(recipe, num_gpus), recipe)


def recommend(recipe: RunConfig, num_gpus: int) -> LayoutPlan | None:
    """Return the fastest layout of a recipe that fits, or None."""
    found = search_layouts(recipe, num_gpus, HardwareProfile())
    return found.feasible[0] if found.feasible else None


def _describe(plan: LayoutPlan | None, recipe: RunConfig) -> tuple[str, ...]:
    if plan is None:
        return ("none fits", *("-" for _ in range(5)))
    overrides = list_overrides(plan.config, base=recipe)
    return (
        plan.config.parallel.describe(plan.num_gpus),
        f"{plan.fullest.total / GIGA:.0f}",
        f"{plan.time.total:.2f}",
        f"{plan.days:.1f}",
        f"{plan.mfu:.1%}",
        f"`{' '.join(overrides)}`" if overrides else "none",
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
