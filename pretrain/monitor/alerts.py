"""Finds what a person should look at."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from pretrain.costs import SPACE_MARGIN
from pretrain.monitor.folder import RunFolderView
from pretrain.monitor.history import History
from pretrain.monitor.summary import Summary
from pretrain.monitor.text import format_bytes, format_seconds
from pretrain.run.run_status import RunPhase

SILENT_STEPS = 5  # without a sign of life for as many median steps
SILENT_SECONDS = 30.0  # at least: status.json is renewed every 10 seconds, evaluations and saves take their time
RECENT_STEPS = 500  # of events that still matter
DATA_SHARE = 0.2  # of a step
SLOW_STEPS = 20  # that a rank must be the slowest in
ABOUT_STEPS = ("spike", "nonfinite", "rollback")
ABOUT_MACHINES = ("straggler", "recompiled", "corrupt_checkpoint")


def find_alerts(view: RunFolderView, history: History, summary: Summary, num_damaged: int = 0) -> list[str]:
    """Yield one line per alert, the worst first. num_damaged: lines of the metrics that could not be read."""
    return [
        *_about_life(view, summary),
        *_about_saves(view, history),
        *_about_steps(history, summary),
        *_about_speed(view, history, summary),
        *([f"{num_damaged} lines of the metrics cannot be read"] if num_damaged else []),
    ]


def _about_life(view: RunFolderView, summary: Summary) -> Iterator[str]:
    status = view.status
    if status is not None and summary.state == RunPhase.failed.value:
        yield f"it failed: {status.reason or 'no reason is given, see train.log'}"
    if not summary.is_running or summary.age_seconds is None:
        return
    if status is not None and view.is_process_gone:
        yield f"it is said to be running, but process {status.pid} is gone: the same command continues it"
    elif summary.age_seconds > max(SILENT_SECONDS, SILENT_STEPS * (summary.step_seconds or 0.0)):
        step = f", a step takes {format_seconds(summary.step_seconds)}" if summary.step_seconds else ""
        yield f"no sign of life for {format_seconds(summary.age_seconds)}{step}"


def _about_saves(view: RunFolderView, history: History) -> Iterator[str]:
    saved = int(history.checkpoints[-1].get("step", 0)) if history.checkpoints else 0
    saved = max(saved, view.checkpoint.step if view.checkpoint else 0)
    failures = [event for event in history.events if event.get("event") == "save_failed"]
    if failures and failures[-1].get("step", 0) > saved:
        yield f"the last save failed (step {failures[-1].get('step')}): {failures[-1].get('message', '')}"
    if view.num_set_aside:
        yield f"{view.num_set_aside} damaged checkpoints were set aside (checkpoints/*.corrupt)"
    if view.checkpoint and not view.is_saving and view.free_bytes < SPACE_MARGIN * view.checkpoint.num_bytes:
        yield (
            f"the disk is nearly full: the next checkpoint needs {format_bytes(view.checkpoint.num_bytes)}, "
            f"{format_bytes(view.free_bytes)} are free"
        )


def _about_steps(history: History, summary: Summary) -> Iterator[str]:
    recent = _recent_events(history, summary)
    for kinds in (ABOUT_STEPS, ABOUT_MACHINES):
        counts = Counter(event["event"] for event in recent if event.get("event") in kinds)
        for kind, count in counts.items():
            last = next(event for event in reversed(recent) if event.get("event") == kind)
            times = f" ({count} times in {RECENT_STEPS} steps)" if count > 1 else ""
            yield f"{kind.replace('_', ' ')} at step {last.get('step')}{times}: {last.get('message', '')}"


def _about_speed(view: RunFolderView, history: History, summary: Summary) -> Iterator[str]:
    if summary.data_share is not None and summary.data_share > DATA_SHARE:
        share = f"{summary.data_share:.0%} of the time is spent waiting for data"
        yield f"{share}: raise data.prefetch_steps, look at the disk"
    ranks = history.train.recent("slowest_rank", SLOW_STEPS)
    ratios = history.train.recent("slowest_ratio", SLOW_STEPS)
    is_one = len(ranks) == SLOW_STEPS and len(set(ranks)) == 1
    is_named = any(event.get("event") == "straggler" for event in _recent_events(history, summary))
    if is_one and not is_named and min(ratios, default=0.0) > view.straggler_factor:
        yield f"rank {int(ranks[0])} is the slowest of {SLOW_STEPS} steps, now {ratios[-1]:.1f} times the median"


def _recent_events(history: History, summary: Summary) -> list[dict[str, Any]]:
    return [event for event in history.events if event.get("step", 0) > summary.step - RECENT_STEPS]
