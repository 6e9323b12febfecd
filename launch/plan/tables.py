"""Print a plan, or the result of a search, as tables of at most 100 columns."""

from collections.abc import Sequence
from dataclasses import fields

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from conf.schema import Objective, Recompute, RunConfig
from launch.plan.hardware_profile import GIGA, HardwareProfile
from launch.plan.layout_plan import SECONDS_PER_DAY, LayoutPlan, list_overrides
from launch.plan.search import Search

RECOMPUTE = {
    Recompute.none: "nothing recomputed",
    Recompute.elementwise: "norms and SwiGLU recomputed",
    Recompute.selective: "attention recomputed",
    Recompute.full: "every layer recomputed",
}
PARTS = {
    "compute": "useful FLOPs at the stated MFU",
    "recomputation": "recomputed in the backward",
    "imbalance": "busiest pipeline stage beyond the mean",
    "tensor": "tensor-parallel collectives, not overlapped",
    "context": "keys and values gathered over context-parallel ranks, not overlapped",
    "pipeline": "sends between pipeline stages, not overlapped",
    "bubble": "pipeline fills and drains",
    "data": "data-parallel reduction and gathering that compute does not hide",
}
# From "redo" on: shares of the step beyond useful compute; "pipe" is sends, bubble and imbalance of the pipeline.
SEARCH_COLUMNS = (
    *("TP", "CP", "PP", "VPP", "DP", "micro", "recompute", "GB", "s/step", "days", "MFU"),
    *("redo", "tensor", "keys", "pipe", "data"),
)


def print_plan(console: Console, plan: LayoutPlan) -> None:
    """Print what a person wants to know before a job."""
    console.print(_headline(plan))
    for phrase in plan.not_modelled:
        console.print(f"[yellow]not modelled:[/] {phrase}")
    console.print(_memory_table(plan))
    console.print(_fit(plan))
    console.print(_time_table(plan))
    console.print(_duration(plan))
    if plan.traffic:
        console.print(_traffic_table(plan))
    console.print(_checkpoints(plan))


def describe_run(plan: LayoutPlan) -> str:
    """Describe layout, batch and recomputation in one phrase."""
    train = plan.config.train
    return (
        f"{plan.config.parallel.describe(plan.num_gpus)}, micro batch {train.micro_batch_size} x "
        f"{plan.shape.num_microbatches} of {train.global_batch_size}, {RECOMPUTE[plan.config.parallel.recompute]}"
    )


def _headline(plan: LayoutPlan) -> str:
    config, work = plan.config, plan.work
    doubled = ""
    if config.stage.objective is Objective.joint:
        noisy = work.noisy_length * config.parallel.context_parallel
        doubled = f" and {noisy} noisy positions (at most {config.data.sequence_length})"
    return (
        f"[bold]{config.experiment or f'{config.model.name} {config.stage.name}'}[/] on {plan.num_gpus} GPUs: "
        f"{plan.parameters / 1e9:.2f}B parameters, {config.train.tokens / 1e9:g}B tokens, {config.num_steps} steps\n"
        f"{describe_run(plan)}; {config.precision.dtype.value}, sequences of {config.data.sequence_length}{doubled}\n"
        f"{_flops(plan)} useful GFLOPs per clean token: layers {_share(plan, 'layers')}, attention "
        f"{_share(plan, 'attention')} ({work.attended_pairs / work.tokens:.1f} pairs), head {_share(plan, 'head')}"
        f"{f', vision {_share(plan, "vision")}' if work.flops.vision else ''}; "
        f"{work.positions / work.computed_positions:.1%} of the computed positions are useful"
    )


def _flops(plan: LayoutPlan) -> str:
    own, ar = (f"{work.flops_per_token / 1e9:.3g}" for work in (plan.work, plan.ar_work))
    return own if plan.config.stage.objective is Objective.ar else f"{own} (AR alone {ar})"


def _share(plan: LayoutPlan, part: str) -> str:
    return f"{getattr(plan.work.flops, part) / plan.work.total_flops:.1%}"


def _memory_table(plan: LayoutPlan) -> Table:
    columns = ("weights", "gradients", "optimizer", "activations", "logits", "working", "total")
    unit, name = (GIGA, "GB") if plan.fullest.total >= GIGA else (1e6, "MB")
    table = _table(f"Memory per GPU, {name}", ["pipeline stage"], columns)
    for stage in plan.memory:
        values = [f"{getattr(stage, column) / unit:.2f}" for column in columns]
        position = f"{stage.pipeline_stage + 1} of {len(plan.memory)}"
        table.add_row(position, *values, style="bold" if stage is plan.fullest else None)
    return table


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """Make an empty table: columns of texts, then columns of numbers."""
    table = Table(title=f"\n{title}", title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in texts:
        table.add_column(column)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def _fit(plan: LayoutPlan) -> str:
    hardware, worst = plan.hardware, plan.fullest
    limit = f"{hardware.memory_bytes / GIGA:g} GB less {hardware.reserve_bytes / GIGA:g} GB reserve"
    spare = (hardware.usable_bytes - worst.total) / GIGA
    if plan.fits:
        fit = f"[green]fits[/] {limit}, {spare:.1f} GB to spare"
    else:
        fit = f"[red]does not fit[/] {limit}: {-spare:.1f} GB too much (try --search)"
    return f"{fit}.\nLogits and working memory never coexist: the larger one counts."


def _time_table(plan: LayoutPlan) -> Table:
    table = _table("Step", ["part"], ("seconds", "share"))
    for field in fields(plan.time):
        seconds = getattr(plan.time, field.name)
        if seconds > 0:
            table.add_row(f"{field.name}: {PARTS[field.name]}", f"{seconds:.3g}", f"{seconds / plan.time.total:.1%}")
    table.add_row("total", f"{plan.time.total:.3g}", "", style="bold")
    return table


def _duration(plan: LayoutPlan) -> str:
    tokens = plan.work.tokens / plan.time.total
    return (
        f"At {plan.hardware.mfu:.0%} MFU overall: {plan.time.compute:.3g} s per step, "
        f"{plan.days_at_stated_mfu:.1f} days. With this layout's own costs:\n[bold]{plan.time.total:.3g} s per step, "
        f"{plan.days:.1f} days[/], {plan.mfu:.1%} MFU, {tokens / 1e6:.2f}M clean tokens/s."
    )


def _traffic_table(plan: LayoutPlan) -> Table:
    table = _table(
        "Communication per step",
        ("group", "collective", "of", "over"),
        ("ranks", "times", "MB each", "GB per GPU", "seconds"),
    )
    hardware = plan.hardware
    for item in plan.traffic:
        table.add_row(
            item.group,
            item.operation,
            item.purpose,
            "node" if item.span <= hardware.gpus_per_node else "network",
            str(item.size),
            str(item.count),
            f"{item.message_bytes / 1e6:.1f}",
            f"{item.sent_bytes / GIGA:.2f}",
            f"{item.sent_bytes / hardware.bandwidth(item.span):.3f}",
        )
    return table


def _checkpoints(plan: LayoutPlan) -> str:
    checkpoint, hardware = plan.config.checkpoint, plan.hardware
    copies = checkpoint.keep + 1
    size = (
        f"\nCheckpoint: {plan.checkpoint_bytes / GIGA:.3g} GB, {plan.checkpoint_bytes * copies / GIGA:.3g} GB with "
        f"{copies} on disk while one is written.\n{plan.save_seconds:.2g} s to write at "
        f"{hardware.storage_bandwidth / GIGA:g} GB/s"
    )
    if not checkpoint.every_steps:
        return f"{size}, once at the end."
    seconds = checkpoint.every_steps * plan.time.total
    overhead = "in the background" if checkpoint.asynchronous else f"{plan.save_seconds / seconds:.1%} of the time"
    return f"{size}, every {_span(seconds)} ({checkpoint.every_steps} steps): {overhead}."


def _span(seconds: float) -> str:
    """Write a time in seconds, minutes, hours or days, whichever reads well."""
    for unit, name in ((SECONDS_PER_DAY, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.2g} seconds"


def print_search(
    console: Console, search: Search, config: RunConfig, num_gpus: int, hardware: HardwareProfile, top: int
) -> None:
    """Print the best layouts and the keys of the first, or why there is none."""
    name = config.experiment or f"{config.model.name} {config.stage.name}"
    limit = f"{hardware.memory_bytes / GIGA:g} GB less {hardware.reserve_bytes / GIGA:g} GB reserve"
    console.print(
        f"[bold]{name}[/] on {num_gpus} GPUs of {limit}: the rules allow {search.tried} layouts, "
        f"{len(search.feasible)} of them fit."
    )
    if not search.feasible:
        console.print(explain_failure(search, hardware), soft_wrap=True)
        return
    console.print(_search_table(search.feasible[:top]))
    for phrase in search.feasible[0].not_modelled:
        console.print(f"[yellow]not modelled:[/] {phrase}")
    console.print(f"Fastest: {' '.join(list_overrides(search.feasible[0].config))}", soft_wrap=True)
    console.print(
        f"Compute at {hardware.mfu:.0%} of the peak whatever the layout; collectives within layers and pipeline sends "
        "not\noverlapped. redo (recomputation), tensor, keys (of context parallelism), pipe, data: shares of the "
        "step.\nTimes within a few percent are a draw."
    )


def explain_failure(search: Search, hardware: HardwareProfile) -> str:
    """Explain why nothing fits: too large, or rejected by the rules."""
    if search.smallest is None:
        return f"Why none, for example: {search.example or 'no degrees make up this number of GPUs'}"
    smallest = search.smallest
    excess = (smallest.fullest.total - hardware.usable_bytes) / GIGA
    return (
        f"The smallest needs {smallest.fullest.total / GIGA:.1f} GB on its fullest GPU, {excess:.1f} GB too much: "
        f"{' '.join(list_overrides(smallest.config))}. More GPUs share the optimizer's state further; a shorter "
        "data.sequence_length shrinks activations; runtime.loss_chunk_rows bounds logits."
    )


def _search_table(plans: list[LayoutPlan]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for column in SEARCH_COLUMNS:
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
            f"{plan.fullest.total / GIGA:.1f}",
            f"{time.total:.2f}",
            f"{plan.days:.1f}",
            f"{plan.mfu:.1%}",
            *(f"{seconds / time.total:.1%}" for seconds in shares),
        )
    return table
