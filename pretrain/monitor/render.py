"""The summary on a terminal."""

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pretrain.monitor.folder import FolderFacts
from pretrain.monitor.sparkline import draw_sparkline
from pretrain.monitor.summary import Metric, Summary
from pretrain.monitor.units import format_bytes, format_count, format_seconds
from pretrain.run.run_status import RunPhase

LABELS = {
    "loss": "loss",
    "ar_loss": "AR loss",
    "diffusion_loss": "diffusion loss",
    "acceptance_length": "acceptance length",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_second": "tokens/s",
}
STATE_STYLES = {
    RunPhase.running.value: "bold green",
    RunPhase.complete.value: "bold green",
    RunPhase.stopped.value: "bold yellow",
    RunPhase.failed.value: "bold red",
}
CURVE_WIDTH = 48
BAR_WIDTH = 40


def render(facts: FolderFacts, summary: Summary, alerts: list[str], now: float) -> RenderableType:
    """Everything, in the order in which it is looked for. now: seconds since 1970."""
    return Group(
        _render_head(facts, summary),
        _render_progress(facts, summary),
        Text(),
        _render_metrics(summary),
        Text(),
        _render_details(facts, summary, now),
        *([Text(), *(_render_alert(alert) for alert in alerts)] if alerts else []),
    )


def _render_head(facts: FolderFacts, summary: Summary) -> Text:
    state = Text(summary.state, style=STATE_STYLES.get(summary.state, "bold"))
    parts = [Text.assemble((facts.title, "bold"), "  ", state)]
    if facts.status is not None and facts.status.reason:
        parts.append(Text(facts.status.reason))
    if summary.age_seconds is not None:
        parts.append(Text(f"last sign of life {format_seconds(summary.age_seconds)} ago"))
    if facts.status is not None and summary.is_running:
        parts.append(Text(f"{facts.status.host}, process {facts.status.pid}"))
    parts.append(Text(str(facts.run_dir), style="dim"))
    return Text(" · ").join(parts)


def _render_progress(facts: FolderFacts, summary: Summary) -> RenderableType:
    total = f"/{facts.total_steps}" if facts.total_steps is not None else ""
    tokens = f"/{format_count(facts.total_tokens)}" if facts.total_tokens is not None else ""
    text = f"step {summary.step}{total} · {format_count(summary.tokens_seen)}{tokens} tokens"
    if summary.progress is None:
        return Text(text)
    text += f" · {summary.progress:.1%}"
    if summary.eta_seconds is not None and summary.progress < 1:
        text += f" · {format_seconds(summary.eta_seconds)} left"
    grid = Table.grid(padding=(0, 2))
    grid.add_row(ProgressBar(total=1.0, completed=summary.progress, width=BAR_WIDTH), Text(text))
    return grid


def _render_metrics(summary: Summary) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("now", justify="right", no_wrap=True)
    table.add_column("held-out", justify="right", no_wrap=True)
    table.add_column("since the first step", no_wrap=True)
    for metric in summary.metrics:
        curve = draw_sparkline(metric.curve, CURVE_WIDTH)
        cells = [_format_metric(metric, value) for value in (metric.value, metric.heldout)]
        table.add_row(LABELS[metric.name], *cells, Text(curve, style="cyan"))
    if not summary.metrics:
        table.add_row("no step is finished yet", "", "", "")
    return table


def _format_metric(metric: Metric, value: float | None) -> str:
    if value is None:
        return ""
    if metric.name == "tokens_per_second":
        return format_count(value)
    return f"{value:.3g}" if metric.name in ("lr", "grad_norm") else f"{value:.4f}"


def _render_details(facts: FolderFacts, summary: Summary, now: float) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for label, text in (
        ("speed", _describe_speed(summary)),
        ("checkpoint", _describe_checkpoint(facts, summary, now)),
        ("restarts", _describe_restarts(facts, summary, now)),
    ):
        grid.add_row(Text(label, style="dim"), text)
    return grid


def _describe_speed(summary: Summary) -> str:
    parts = []
    if summary.step_seconds is not None:
        parts.append(f"{format_seconds(summary.step_seconds)} per step")
    if summary.tokens_per_second is not None:
        parts.append(f"{format_count(summary.tokens_per_second)} tokens/s")
    parts.append("MFU unknown" if summary.mfu is None else f"MFU {summary.mfu:.1%}")
    if summary.data_share is not None:
        parts.append(f"{summary.data_share:.1%} waiting for data")
    if summary.memory_bytes is not None:
        parts.append(f"peak memory {format_bytes(summary.memory_bytes)}")
    return " · ".join(parts)


def _describe_checkpoint(facts: FolderFacts, summary: Summary, now: float) -> str:
    if facts.checkpoint is None:
        return "none yet" + (", one is being written" if facts.is_saving else "")
    found, save = facts.checkpoint, summary.save
    parts = [f"step {found.step}, {format_seconds(max(0.0, now - found.time))} ago, {format_bytes(found.num_bytes)}"]
    if save.get("saved_step", save.get("step")) == found.step:
        for key, words in (("save_seconds", "training waited {}"), ("write_seconds", "complete after {}")):
            if isinstance(save.get(key), int | float):
                parts.append(words.format(format_seconds(save[key])))
    if facts.is_saving:
        parts.append("the next one is being written")
    return " · ".join([*parts, f"{format_bytes(facts.free_bytes)} free"])


def _describe_restarts(facts: FolderFacts, summary: Summary, now: float) -> str:
    text = str(summary.restarts)
    if facts.starts:
        text += f" · started {format_seconds(max(0.0, now - facts.starts[-1]))} ago"
    return text


def _render_alert(alert: str) -> Text:
    return Text.assemble(("! ", "bold red"), (alert, "red"))
