"""The result of a search as a table of at most 100 columns."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from conf.schema import RunConfig
from launch.plan.as_json import layout_overrides
from launch.plan.hardware import GIGA, Hardware
from launch.plan.plan import Plan
from launch.plan.search import Search

# From "again" on: shares of the step beyond useful compute; "stages" is their sends, bubble and imbalance.
COLUMNS = (
    *("TP", "CP", "PP", "VPP", "DP", "micro", "recompute", "GB", "s/step", "days", "MFU"),
    *("again", "tensor", "keys", "stages", "data"),
)


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
    for phrase in search.feasible[0].not_modelled:
        console.print(f"[yellow]not modelled:[/] {phrase}")
    console.print(f"Fastest: {' '.join(layout_overrides(search.feasible[0]))}", soft_wrap=True)
    console.print(
        f"Compute at {hardware.mfu:.0%} of the peak whatever the layout; collectives within layers and pipeline sends "
        "not\noverlapped. again, tensor, keys (of context parallelism), stages, data: shares of the step.\n"
        "Times within a few percent are a draw."
    )


def explain_failure(search: Search, hardware: Hardware) -> str:
    """Why nothing fits: too large, or refused by the rules."""
    if search.smallest is None:
        return f"Why none, for example: {search.example or 'no degrees make up this number of GPUs'}"
    smallest = search.smallest
    excess = (smallest.worst.total - hardware.usable_bytes) / GIGA
    return (
        f"The smallest needs {smallest.worst.total / GIGA:.1f} GB on its fullest GPU, {excess:.1f} GB too much: "
        f"{' '.join(layout_overrides(smallest))}. More GPUs share the optimizer's state further; a shorter "
        "data.sequence_length shrinks activations; runtime.loss_chunk_rows bounds logits."
    )


def _table(plans: list[Plan]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "recompute" else "right")
    for plan in plans:
        time = plan.time
        pipeline = time.pipeline + time.bubble + time.imbalance
        shares = [time.recomputation, time.tensor, time.context, pipeline, time.data]
        parallel = plan.config.parallel
        degrees = (
            parallel.tensor_parallel,
            parallel.context_parallel,
            parallel.pipeline_parallel,
            parallel.virtual_pipeline_parallel,
            plan.shape.data_parallel,
            plan.config.train.micro_batch_size,
        )
        table.add_row(
            *map(str, degrees),
            parallel.recompute.value,
            f"{plan.worst.total / GIGA:.1f}",
            f"{time.total:.2f}",
            f"{plan.days:.1f}",
            f"{plan.mfu:.1%}",
            *(f"{seconds / time.total:.1%}" for seconds in shares),
        )
    return table
