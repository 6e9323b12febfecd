"""The README's table of layouts: `python -m launch.plan.recommend` prints it, in seconds.

One row per size, stage and number of H100: the fastest layout that the search finds for the released recipe, and what
is predicted of it.
"""

import sys
from collections.abc import Iterator

from conf.composition.compose import compose_size
from conf.schema import ParallelConfig
from conf.system.entry import OneLineParser, exit_status
from launch.plan.hardware import GIGA, Hardware
from launch.plan.plan import Plan
from launch.plan.search import search_layouts

SIZES, STAGES, GPUS = ("3b", "8b", "14b"), ("ar", "joint"), (8, 64, 256)
PRESETS = {1: "h100", 2: "h100_tp2", 4: "h100_tp4"}  # conf/parallel, by tensor-parallel degree
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
                yield size, stage, str(num_gpus), *_describe(recommend(size, stage, num_gpus))


def recommend(size: str, stage: str, num_gpus: int) -> Plan | None:
    """The fastest layout that fits, of the recipe experiment=nld_<size>_<stage>; None where none does."""
    found = search_layouts(compose_size([f"experiment=nld_{size}_{stage}"]), num_gpus, Hardware())
    return found.feasible[0] if found.feasible else None


def _describe(plan: Plan | None) -> tuple[str, ...]:
    if plan is None:
        return ("none fits", *("-" for _ in range(6)))
    config = plan.config
    return (
        f"`{' '.join(parallel_overrides(config.parallel))}`",
        str(config.train.micro_batch_size),
        config.parallel.recompute.value,
        f"{plan.worst.total / GIGA:.0f}",
        f"{plan.time.total:.2f}",
        f"{plan.days:.1f}",
        f"{plan.mfu:.1%}",
    )


def parallel_overrides(parallel: ParallelConfig) -> list[str]:
    """The option of conf/parallel with most of a layout, and the keys in which the layout differs from it."""
    degrees = {
        "tensor_parallel": (parallel.tensor_parallel, max(d for d in PRESETS if d <= parallel.tensor_parallel)),
        "context_parallel": (parallel.context_parallel, 1),
        "pipeline_parallel": (parallel.pipeline_parallel, 1),
        "virtual_pipeline_parallel": (parallel.virtual_pipeline_parallel, 1),
    }
    others = [f"parallel.{name}={value}" for name, (value, preset) in degrees.items() if value != preset]
    return [f"parallel={PRESETS[degrees['tensor_parallel'][1]]}", *others]


if __name__ == "__main__":
    sys.exit(exit_status(main))
