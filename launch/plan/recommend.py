"""The table of recommended layouts: `python -m launch.plan.recommend` prints it, in seconds.

One row per size, stage and number of H100: the fastest layout that the search finds for the released recipe, and what
is predicted of it.
"""

import sys
from collections.abc import Iterator

from conf.composition.compose import compose_size
from conf.schema import ParallelConfig, RunConfig
from conf.system.entry import OneLineParser, exit_status
from launch.plan.hardware import GIGA, Hardware
from launch.plan.plan import Plan
from launch.plan.search import search_layouts

SIZES, STAGES, GPUS = ("3b", "8b", "14b"), ("ar", "joint"), (8, 64, 256)
COLUMNS = ("size", "stage", "H100", "layout", "micro batch", "recompute", "GB per GPU", "s per step", "days", "MFU")


def main() -> None:
    """Prints Markdown."""
    parser = OneLineParser(prog="python -m launch.plan.recommend", description=__doc__)
    parser.parse_args()
    print("\n".join(build_table()))


def build_table() -> list[str]:
    """Lines of Markdown."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *_rows()]
    return [f"| {' | '.join(row)} |" for row in rows]


def _rows() -> Iterator[tuple[str, ...]]:
    for size in SIZES:
        for stage in STAGES:
            for num_gpus in GPUS:
                recipe = compose_recipe(size, stage)
                yield size, stage, str(num_gpus), *_describe(recommend(recipe, num_gpus), recipe)


def compose_recipe(size: str, stage: str) -> RunConfig:
    """Compose the recipe experiment=nld_<size>_<stage>."""
    return compose_size([f"experiment=nld_{size}_{stage}"])


def recommend(recipe: RunConfig, num_gpus: int) -> Plan | None:
    """Return the fastest layout of `recipe` that fits; None where none does."""
    found = search_layouts(recipe, num_gpus, Hardware())
    return found.feasible[0] if found.feasible else None


def _describe(plan: Plan | None, recipe: RunConfig) -> tuple[str, ...]:
    if plan is None:
        return ("none fits", *("-" for _ in range(6)))
    config = plan.config
    overrides = parallel_overrides(config.parallel, recipe.parallel)
    return (
        f"`{' '.join(overrides)}`" if overrides else "the recipe's",
        str(config.train.micro_batch_size),
        config.parallel.recompute.value,
        f"{plan.worst.total / GIGA:.0f}",
        f"{plan.time.total:.2f}",
        f"{plan.days:.1f}",
        f"{plan.mfu:.1%}",
    )


def parallel_overrides(parallel: ParallelConfig, recipe: ParallelConfig) -> list[str]:
    """Return the keys to give so that a recipe, whose layout is `recipe`, has the layout `parallel`."""
    degrees = (
        "tensor_parallel",
        "context_parallel",
        "pipeline_parallel",
        "virtual_pipeline_parallel",
        "sequence_parallel",
    )
    changed = [name for name in degrees if getattr(parallel, name) != getattr(recipe, name)]
    return [f"parallel.{name}={str(getattr(parallel, name)).lower()}" for name in changed]


if __name__ == "__main__":
    sys.exit(exit_status(main))
