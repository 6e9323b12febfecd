"""Renders the summary for a terminal."""

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pretrain.monitor.folder import RunFolderView
from pretrain.monitor.summary import Metric, Summary
from pretrain.monitor.text import draw_sparkline, format_bytes, format_count, format_seconds
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


def render(view: RunFolderView, summary: Summary, alerts: list[str], now: float) -> RenderableType:
    """Render everything, in the order in which it is looked for. now: seconds since 1970."""
    return Group(
        _render_head(view, summary),
        _render_progress(view, summary),
        Text(),
        _render_metrics(summary),
        Text(),
        _render_details(view, summary, now),
        *([Text(), *(_render_alert(alert) for alert in alerts)] if alerts else []),
    )


def _render_head(view: RunFolderView, summary: Summary) -> Text:
    state = Text(summary.state, style=STATE_STYLES.get(summary.state, "bold"))
    parts = [Text.assemble((view.title, "bold"), "  ", state)]
    if view.status is not None and view.status.reason:
        parts.append(Text(view.status.reason))
    if summary.age_seconds is not None:
        parts.append(Text(f"last sign of life {format_seconds(summary.age_seconds)} ago"))
    if view.status is not None and summary.is_running:
        parts.append(Text(f"{view.status.host}, process {view.status.pid}"))
    parts.append(Text(str(view.run_dir), style="dim"))
    return Text(" · ").join(parts)


def _render_progress(view: RunFolderView, summary: Summary) -> RenderableType:
    total = f"/{view.total_steps}" if view.total_steps is not None else ""
    tokens = f"/{format_count(view.total_tokens)}" if view.total_tokens is not None else ""
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


def _render_details(view: RunFolderView, summary: Summary, now: float) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for label, text in (
        ("speed", _describe_speed(summary)),
        ("kernels", _describe_kernels(view)),
        ("checkpoint", _describe_checkpoint(view, summary, now)),
        ("restarts", _describe_restarts(view, summary, now)),
    ):
        if text:
            grid.add_row(Text(label, style="dim"), text)
    return grid


def _describe_speed(summary: Summary) -> str:
    parts = []
    if summary.step_seconds is not None:
        parts.append(f"{format_seconds(summary.step_seconds)} per step")
    if summary.tokens_per_second is not None:
        parts.append(f"{format_count(summary.tokens_per_second)} tokens/s")
    parts.append("MFU unknown" if summary.mfu is None else f"MFU {summary.mfu:.1%}")
    if summary.useful_share is not None:
        parts.append(f"{summary.useful_share:.1%} of positions useful")
    if summary.rank_imbalance is not None and summary.undealt_rank_imbalance is not None:
        dealt, undealt = (value - 1 for value in (summary.rank_imbalance, summary.undealt_rank_imbalance))
        parts.append(f"fullest rank {dealt:.1%} above the mean (in order {undealt:.1%})")
    if summary.data_share is not None:
        parts.append(f"{summary.data_share:.1%} waiting for data")
    if summary.memory_bytes is not None:
        parts.append(f"peak memory {format_bytes(summary.memory_bytes)}")
    return " · ".join(parts)


def _describe_kernels(view: RunFolderView) -> str:
    """Return what was compiled; nothing where nothing is, as on CPUs."""
    if view.status is None or not (counts := view.status.kernels).compiled_kernels + counts.loaded_kernels:
        return ""
    parts = [f"{counts.compiled_kernels} compiled, {counts.loaded_kernels} from the cache"]
    parts.append(f"{format_seconds(counts.compile_seconds)} since the start")
    parts.append(f"{counts.recompiled_kernels or 'none'} after the first steps")
    return " · ".join(parts)


def _describe_checkpoint(view: RunFolderView, summary: Summary, now: float) -> str:
    if view.checkpoint is None:
        return "none yet" + (", one is being written" if view.is_saving else "")
    found, save = view.checkpoint, summary.save
    parts = [f"step {found.step}, {format_seconds(max(0.0, now - found.time))} ago, {format_bytes(found.num_bytes)}"]
    if save.get("saved_step", save.get("step")) == found.step:
        for key, words in (("save_seconds", "training waited {}"), ("write_seconds", "complete after {}")):
            if isinstance(save.get(key), int | float):
                parts.append(words.format(format_seconds(save[key])))
    if view.is_saving:
        parts.append("the next one is being written")
    return " · ".join([*parts, f"{format_bytes(view.free_bytes)} free"])


def _describe_restarts(view: RunFolderView, summary: Summary, now: float) -> str:
    text = str(summary.restarts)
    if view.starts:
        text += f" · started {format_seconds(max(0.0, now - view.starts[-1]))} ago"
    return text


def _render_alert(alert: str) -> Text:
    return Text.assemble(("! ", "bold red"), (alert, "red"))
