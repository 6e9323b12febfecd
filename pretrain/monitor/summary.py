"""Computes where a run stands from its folder and its metrics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pretrain.monitor.folder import RunFolderView
from pretrain.monitor.history import LOSSES, History
from pretrain.run.run_status import RunPhase

RECENT_STEPS = 50  # over which speed is measured
POSITIONS = ("useful_positions", "computed_positions")
LIVE_SECONDS = 60.0  # of a run without status.json: written to so lately, it is said to be running


@dataclass(frozen=True)
class Metric:
    """Holds one row of the summary. value, heldout: newest, or None. curve: of all steps, NaN where unknown."""

    name: str
    value: float | None
    heldout: float | None
    curve: Sequence[float]


@dataclass(frozen=True)
class Summary:
    """Holds where a run stands. state: a RunPhase's name, or `unknown` for a silent run without status.json.

    age_seconds: since the last sign of life. step, tokens_seen: done. progress: 0..1. eta_seconds: at the recent speed.
    step_seconds: median of recent steps. data_share: of recent steps, waiting for data. useful_share: of the positions
    that recent steps computed. rank_imbalance: work of the fullest rank over the mean, undealt_rank_imbalance: dealt in
    order. save: the newest line of kind checkpoint. restarts: starts but the first.
    """

    state: str
    age_seconds: float | None
    step: int
    tokens_seen: int
    progress: float | None
    eta_seconds: float | None
    step_seconds: float | None
    tokens_per_second: float | None
    data_share: float | None
    mfu: float | None
    useful_share: float | None
    rank_imbalance: float | None
    undealt_rank_imbalance: float | None
    memory_bytes: float | None
    restarts: int
    save: dict[str, Any]
    metrics: tuple[Metric, ...]

    @property
    def is_running(self) -> bool:
        """Whether the run is reported to be running."""
        return self.state == RunPhase.running.value


def summarise(view: RunFolderView, history: History, now: float) -> Summary:
    """Compute the summary. now: seconds since 1970."""
    step, tokens_seen = _find_position(view, history)
    steps_left = _count_steps_left(view, step, tokens_seen)
    seconds = history.train.recent("step_seconds", RECENT_STEPS)
    step_seconds = median(seconds) if seconds else None
    data_seconds = history.train.recent("data_seconds", RECENT_STEPS)
    state, age = _find_state(view, now)
    is_going = state in (RunPhase.running.value, "unknown")
    return Summary(
        state=state,
        age_seconds=age,
        step=step,
        tokens_seen=tokens_seen,
        progress=None if steps_left is None else step / max(1, step + steps_left),
        eta_seconds=steps_left * step_seconds if step_seconds and steps_left is not None and is_going else None,
        step_seconds=step_seconds,
        tokens_per_second=_median(history.train.recent("tokens_per_second", RECENT_STEPS)),
        data_share=sum(data_seconds) / sum(seconds) if data_seconds and sum(seconds) else None,
        mfu=_median(history.train.recent("mfu", RECENT_STEPS)),
        useful_share=_divide_sums(*(history.train.recent(name, RECENT_STEPS) for name in POSITIONS)),
        rank_imbalance=_median(history.train.recent("rank_imbalance", RECENT_STEPS)),
        undealt_rank_imbalance=_median(history.train.recent("undealt_rank_imbalance", RECENT_STEPS)),
        memory_bytes=history.train.last("memory_bytes"),
        restarts=max(len(view.starts) - 1, len(history.restores), 0),
        save=history.checkpoints[-1] if history.checkpoints else {},
        metrics=tuple(_list_metrics(history)),
    )


def _find_position(view: RunFolderView, history: History) -> tuple[int, int]:
    """Return the step and tokens of whichever is newer: the metrics of every step, or the status."""
    if len(history.train):
        return int(history.train["step"][-1]), int(history.train["tokens_seen"][-1])
    return (view.status.step, view.status.tokens_seen) if view.status else (0, 0)


def _count_steps_left(view: RunFolderView, step: int, tokens_seen: int) -> int | None:
    """Count by tokens where they are the budget: a run may have changed its batch on the way."""
    if view.total_tokens is not None and view.tokens_per_step:
        return max(0, (view.total_tokens - tokens_seen) // view.tokens_per_step)
    return None if view.total_steps is None else max(0, view.total_steps - step)


def _find_state(view: RunFolderView, now: float) -> tuple[str, float | None]:
    signs = [view.written, view.status.time if view.status else None]
    newest = max((sign for sign in signs if sign is not None), default=None)
    age = None if newest is None else max(0.0, now - newest)
    if view.status is not None:
        return view.status.state, age
    return (RunPhase.running.value if age is not None and age < LIVE_SECONDS else "unknown"), age


def _list_metrics(history: History) -> list[Metric]:
    """List the losses that this run has, then gradient norm and learning rate."""
    names = [name for name in (*LOSSES, "grad_norm", "lr", "tokens_per_second") if history.train.has(name)]
    return [Metric(name, history.train.last(name), history.heldout.last(name), history.train[name]) for name in names]


def _median(values: list[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return median(known) if known else None


def _divide_sums(parts: list[float], wholes: list[float]) -> float | None:
    return sum(parts) / sum(wholes) if sum(wholes) else None
