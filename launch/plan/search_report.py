"""The result of a search as a table of at most 100 columns."""

from rich.console import Console
from rich.table import Table

from conf.schema import RunConfig
from launch.plan.as_json import layout_overrides
from launch.plan.hardware import GIGA, Hardware
from launch.plan.plan import Plan
from launch.plan.search import Search


def print_search(
    console: Console, search: Search, config: RunConfig, num_gpus: int, hardware: Hardware, top: int
) -> None:
    """The best layouts and the keys of the first, or why there is none."""
    name = config.experiment or f"{config.model.name} {config.stage.name}"
    limit = f"{hardware.memory_bytes / GIGA:g} GB less {hardware.reserve_bytes / GIGA:g} GB reserve"
    console.print(
        f"[bold]{name}[/] on {num_gpus} GPUs of {limit}: {search.tried} layouts obey the rules, "
        f"{len(search.feasible)} of them fit."
    )
    if not search.feasible:
        console.print(explain_failure(search, hardware), soft_wrap=True)
        return
    console.print(_table(search.feasible[:top]))
    console.print(f"Fastest: {' '.join(layout_overrides(search.feasible[0]))}", soft_wrap=True)
    console.print(
        f"Compute at {hardware.mfu:.0%} of the peak whatever the layout; collectives within layers and pipeline sends "
        "not overlapped.\nTimes within a few percent of each other are a draw: try both."
    )


def explain_failure(search: Search, hardware: Hardware) -> str:
    """Why nothing fits: too large, or refused by the rules."""
    if search.smallest is None:
        refused = ", ".join(f"{key} ({times})" for key, times in search.refused.most_common())
        return f"No layout obeys the rules; what refused them: {refused or 'no degree divides the number of GPUs'}."
    smallest = search.smallest
    excess = (smallest.worst.total - hardware.usable_bytes) / GIGA
    return (
        f"The smallest needs {smallest.worst.total / GIGA:.1f} GB on its fullest GPU, {excess:.1f} GB too much: "
        f"{' '.join(layout_overrides(smallest))}. More GPUs share the optimizer's state further; a shorter "
        "data.sequence_length shrinks activations; runtime.loss_chunk_rows bounds logits."
    )


def _table(plans: list[Plan]) -> Table:
    table = Table()
    for column in ("layout", "micro", "recompute", "GB", "s/step", "days", "MFU", "again", "tensor", "bubble", "data"):
        table.add_column(column, justify="left" if column in ("layout", "recompute") else "right")
    for plan in plans:
        time = plan.time
        shares = [time.recomputation, time.tensor, time.bubble + time.imbalance + time.pipeline, time.data]
        table.add_row(
            plan.config.parallel.describe(plan.num_gpus),
            str(plan.config.train.micro_batch_size),
            plan.config.parallel.recompute.value,
            f"{plan.worst.total / GIGA:.1f}",
            f"{time.total:.2f}",
            f"{plan.days:.1f}",
            f"{plan.mfu:.1%}",
            *(f"{seconds / time.total:.1%}" for seconds in shares),
        )
    return table
