"""A plan as tables of at most 100 columns."""

from dataclasses import fields

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from conf.schema import Objective, Recompute
from launch.plan.hardware import GIGA
from launch.plan.memory import StageMemory
from launch.plan.plan import SECONDS_PER_DAY, Plan

RECOMPUTE = {
    Recompute.none: "nothing recomputed",
    Recompute.selective: "attention recomputed",
    Recompute.full: "every layer recomputed",
}
PARTS = {
    "compute": "useful FLOPs at the stated MFU",
    "recomputation": "forward computed again",
    "imbalance": "busiest pipeline stage beyond the mean",
    "tensor": "tensor-parallel collectives, not overlapped",
    "pipeline": "sends between stages, not overlapped",
    "bubble": "pipeline fills and drains",
    "data": "data-parallel reduction and gathering that compute does not hide",
}


def print_plan(console: Console, plan: Plan) -> None:
    """What a person wants to know before a job."""
    console.print(_headline(plan))
    console.print(_memory_table(plan))
    console.print(_verdict(plan))
    console.print(_time_table(plan))
    console.print(_duration(plan))
    if plan.traffic:
        console.print(_traffic_table(plan))
    console.print(_checkpoints(plan))


def describe_run(plan: Plan) -> str:
    """Layout, batch and recomputation in one phrase."""
    train = plan.config.train
    return (
        f"{plan.config.parallel.describe(plan.num_gpus)}, micro batch {train.micro_batch_size} x "
        f"{plan.shape.num_microbatches} of {train.global_batch_size}, {RECOMPUTE[plan.config.parallel.recompute]}"
    )


def _headline(plan: Plan) -> str:
    config, work = plan.config, plan.work
    doubled = " doubled" if config.stage.objective is Objective.joint else ""
    return (
        f"[bold]{config.experiment or f'{config.model.name} {config.stage.name}'}[/] on {plan.num_gpus} GPUs: "
        f"{plan.parameters / 1e9:.2f}B parameters, {config.train.tokens / 1e9:g}B tokens, {config.num_steps} steps\n"
        f"{describe_run(plan)}; {config.precision.dtype.value}, sequences of {config.data.sequence_length}{doubled}\n"
        f"{work.flops_per_token / 1e9:.2f} GFLOPs per clean token: layers {_share(plan, 'layers')}, "
        f"attention {_share(plan, 'attention')}, head {_share(plan, 'head')}; "
        f"{work.pairs / work.tokens:.1f} pairs attend per token"
    )


def _share(plan: Plan, part: str) -> str:
    return f"{getattr(plan.work.flops, part) / plan.work.total_flops:.1%}"


def _memory_table(plan: Plan) -> Table:
    columns = ("weights", "gradients", "optimizer", "activations", "logits", "working", "total")
    table = Table(title="Memory per GPU, GB", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("stage")
    for column in columns:
        table.add_column(column, justify="right")
    for name, stage in _distinct_stages(plan.memory):
        style = "bold" if stage is plan.worst else None
        values = [f"{getattr(stage, column) / GIGA:.2f}" for column in columns]
        table.add_row(name, *values, style=style)
    return table


def _distinct_stages(stages: list[StageMemory]) -> list[tuple[str, StageMemory]]:
    """Stages with their names; all of them, for each holds another number of microbatches."""
    return [(f"{stage.stage + 1} of {len(stages)}", stage) for stage in stages]


def _verdict(plan: Plan) -> str:
    hardware, worst = plan.hardware, plan.worst
    limit = f"{hardware.memory_bytes / GIGA:g} GB less {hardware.reserve_bytes / GIGA:g} GB reserve"
    spare = (hardware.usable_bytes - worst.total) / GIGA
    if plan.fits:
        verdict = f"[green]fits[/] {limit}, {spare:.1f} GB to spare"
    else:
        verdict = f"[red]does not fit[/] {limit}: {-spare:.1f} GB too much (--search finds layouts that fit)"
    return f"{verdict}. Logits and working memory take turns: the larger counts.\n"


def _time_table(plan: Plan) -> Table:
    table = Table(title="Step", title_justify="left", box=SIMPLE_HEAD)
    for column in ("part", "seconds", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for field in fields(plan.time):
        seconds = getattr(plan.time, field.name)
        if seconds > 0:
            table.add_row(f"{field.name}: {PARTS[field.name]}", f"{seconds:.3f}", f"{seconds / plan.time.total:.1%}")
    table.add_row("total", f"{plan.time.total:.3f}", "", style="bold")
    return table


def _duration(plan: Plan) -> str:
    tokens = plan.work.tokens / plan.time.total
    return (
        f"At {plan.hardware.mfu:.0%} MFU overall: {plan.time.compute:.2f} s per step, "
        f"{plan.days_at_stated_mfu:.1f} days. With this layout's costs on top: {plan.time.total:.2f} s, "
        f"[bold]{plan.days:.1f} days[/], {plan.mfu:.1%} MFU, {tokens / 1e6:.2f}M tokens/s.\n"
    )


def _traffic_table(plan: Plan) -> Table:
    table = Table(title="Communication per step", title_justify="left", box=SIMPLE_HEAD)
    for column in ("group", "ranks", "collective", "times", "MB each", "GB sent per GPU", "over", "seconds"):
        left = column in ("group", "collective", "over")
        table.add_column(column, justify="left" if left else "right")
    hardware = plan.hardware
    for item in plan.traffic:
        table.add_row(
            item.group,
            str(item.size),
            item.operation,
            str(item.count),
            f"{item.message_bytes / 1e6:.1f}",
            f"{item.sent_bytes / GIGA:.2f}",
            "node" if item.span <= hardware.gpus_per_node else "network",
            f"{item.sent_bytes / hardware.bandwidth(item.span):.3f}",
        )
    return table


def _checkpoints(plan: Plan) -> str:
    checkpoint, hardware = plan.config.checkpoint, plan.hardware
    size = f"Checkpoint: {plan.checkpoint_bytes / GIGA:.1f} GB, {checkpoint.keep + 1} on disk while one is written: "
    size += f"{plan.checkpoint_bytes * (checkpoint.keep + 1) / GIGA:.0f} GB. "
    size += f"{plan.save_seconds:.0f} s to write at {hardware.storage_bandwidth / GIGA:g} GB/s"
    if not checkpoint.every_steps:
        return f"{size}, once at the end."
    seconds = checkpoint.every_steps * plan.time.total
    overhead = "in the background" if checkpoint.asynchronous else f"{plan.save_seconds / seconds:.1%} of the time"
    return f"{size}, every {_span(seconds)} ({checkpoint.every_steps} steps): {overhead}."


def _span(seconds: float) -> str:
    """Minutes, hours or days, whichever reads well."""
    for unit, name in ((SECONDS_PER_DAY, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} seconds"
