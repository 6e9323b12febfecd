"""Print what simulated ranks did, beside what launch.plan predicts, in tables of at most 140 columns."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conf.schema import RunConfig
from launch.simulate.compare import Compared
from launch.simulate.faults import EXPLAINED_QUESTIONS
from launch.simulate.job import SimulatedJob
from launch.simulate.rank_report import GIB, RankReport, Recording

MIB = 2**20
NOTABLE = 0.02  # difference from which a figure is marked
MODULES_SHOWN = 14  # of modules


def print_job(console: Console, job: SimulatedJob, brief: bool = False) -> None:
    """Print of every rank its peak, what is planned beside, what is alive at the peak, and questions of the host.

    brief: the last two are left out.
    """
    compared = job.compared
    for report in job.reports:
        if report.step is None:
            continue
        console.print(_describe_rank(job.config, report))
        console.print(Text(_describe_peak(job, report, report.step)))
        console.print(_comparison_table(compared[report.rank]))
        if not brief:
            console.print(_module_table(report.step))
            console.print(_tensor_table(report.step))
            console.print(_question_table(report.step))
    _print_faults(console, job)


def _describe_rank(config: RunConfig, report: RankReport) -> str:
    """Name a rank and its place in the job."""
    parallel, place = config.parallel, report.place
    world = len(report.groups["world"])
    sizes = {
        "tensor": parallel.tensor_parallel,
        "context": parallel.context_parallel,
        "data": world // parallel.model_parallel,
        "pipeline": parallel.pipeline_parallel,
    }
    where = ", ".join(f"{name} {place[name] + 1} of {size}" for name, size in sizes.items() if size > 1)
    return f"\n[bold]rank {report.rank} of {world}[/] ({where or 'alone'}): {report.parameters / 1e9:.3g}B parameters"


def _describe_peak(job: SimulatedJob, report: RankReport, step: Recording) -> str:
    where = " ".join(filter(None, (step.peak_at.phase, step.peak_at.module, step.peak_at.line)))
    kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in step.kinds.items())
    evaluation = f"; evaluation {report.evaluation.peak / GIB:.2f} GiB" if report.evaluation else ""
    return (
        f"peak {step.peak / GIB:.2f} of {job.memory_bytes / GIB:.0f} GiB in {where or 'small tensors'}\n"
        f"at the peak: {kinds} GiB\n"
        f"{job.num_microbatches} microbatches; {step.before / GIB:.2f} GiB before the step{evaluation}; "
        f"of a checkpoint this rank writes {report.saved_bytes / GIB:.2f} GiB"
    )


def _comparison_table(figures: Sequence[Compared]) -> Table:
    table = start_table(
        "Simulated and planned; the difference is that of the plan from the simulation",
        ["figure"],
        ["simulated", "planned", "difference"],
    )
    for figure in figures:
        mark = "yellow" if abs(figure.difference) >= NOTABLE else None
        values = (_format(value, figure.unit) for value in (figure.simulated, figure.planned))
        table.add_row(
            f"{figure.name}, {_unit(figure.unit)}",
            *values,
            Text(f"{round(figure.difference, 4) + 0.0:+.2%}", mark or ""),
        )
    return table


def _unit(unit: str) -> str:
    return {"bytes": "GiB", "FLOPs": "TFLOPs"}.get(unit, unit)


def _format(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / GIB:.3f}"
    return f"{value / 1e12:.2f}" if unit == "FLOPs" else f"{value:.0f}"


def _module_table(step: Recording) -> Table:
    table = start_table("By module, layers together", ["module"], ["GiB at the peak", "TFLOPs"])
    names = sorted(step.modules.keys() | step.flops.keys(), key=lambda name: -step.modules.get(name, 0))
    for name in names[:MODULES_SHOWN]:
        table.add_row(name, f"{step.modules.get(name, 0) / GIB:.3f}", f"{step.flops.get(name, 0) / 1e12:.2f}")
    if rest := names[MODULES_SHOWN:]:
        num_bytes, flops = (sum(values.get(name, 0) for name in rest) for values in (step.modules, step.flops))
        table.add_row(f"{len(rest)} others", f"{num_bytes / GIB:.3f}", f"{flops / 1e12:.2f}")
    return table


def _tensor_table(step: Recording) -> Table:
    table = start_table(
        "Largest tensors at the peak", ["shape", "format", "module", "made by", "in"], ["number", "MiB each"]
    )
    for tensors in step.largest:
        shape = " x ".join(map(str, tensors.shape))
        made_by = Text(f"{tensors.line} {tensors.phase}")
        table.add_row(
            shape, tensors.dtype, tensors.module, made_by, str(tensors.count), f"{tensors.num_bytes / MIB:.1f}"
        )
    return table


def _question_table(step: Recording) -> Table:
    title = f"The host waits for its device {len(step.questions)} times a step"
    table = start_table(title, ["line", "in", "why"], ["times"])
    by_line = {question.line: question for question in step.questions}
    for line, question in by_line.items():
        times = sum(one.line == line for one in step.questions)
        why = EXPLAINED_QUESTIONS.get(question.function)
        table.add_row(line, question.phase, Text(why or "nothing explains it", "" if why else "bold red"), str(times))
    return table


def _print_faults(console: Console, job: SimulatedJob) -> None:
    for fault in job.faults:
        console.print(Text(f"{fault}", "bold red"), soft_wrap=True)
    if not job.faults:
        console.print("\n[green]no fault found[/]: no error, no hidden question, collectives of all ranks agree")


def start_table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """Make an empty table: columns of texts, then columns of numbers."""
    table = Table(title=f"\n{title}", title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in texts:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right")
    return table
