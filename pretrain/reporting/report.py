"""Everything a run says: metrics.jsonl and its reporters, the console, status.json. Only rank 0 speaks."""

import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import median_low
from typing import Any

from conf.schema import RunConfig
from pretrain.checkpointing.checkpointer import SaveReport
from pretrain.health.guard import LossGuard, Verdict
from pretrain.health.heartbeat import Beat
from pretrain.objective.losses import LossStats
from pretrain.objective.scoring import StepCounts
from pretrain.reporting.console import Console
from pretrain.reporting.flops import compute_step_flops, find_peak_flops
from pretrain.run.metrics import load_metrics, measure_memory_bytes
from pretrain.run.run_data import RunData
from pretrain.run.run_status import RunPhase, TrainState, write_status
from pretrain.run.session import RunSession

logger = logging.getLogger(__name__)

STATUS_SECONDS = 10.0  # between two refreshes of status.json while nothing but the step changes


@dataclass(frozen=True)
class StepOutcome:
    """One optimizer step. grad_norm: before clipping. applied: whether the weights were updated.

    seconds: of the whole step, data_seconds of them waiting for data.
    """

    stats: LossStats
    counts: StepCounts
    grad_norm: float
    learning_rate: float
    seconds: float
    data_seconds: float
    beat: Beat
    applied: bool


@dataclass
class RunReport:
    """Writes metrics.jsonl, the log and status.json; all of them on rank 0 alone."""

    config: RunConfig
    session: RunSession
    console: Console
    _status_written: float = field(default=float("-inf"), init=False)

    def say_phase(self, phase: RunPhase, state: TrainState, reason: str = "") -> None:
        """Replace status.json."""
        if self.session.ranks.is_first:
            write_status(self.session.run_dir, phase, state, reason)
            self._status_written = time.monotonic()

    def say_data(self, data: RunData, state: TrainState) -> None:
        """What an epoch of each source holds and what was left out, once per start."""
        self.console.say_data(data, state)
        counts = {name: asdict(source.counts) for name, source in data.train.sources.items()}
        values = {f"{name}/{key}": value for name, fields in counts.items() for key, value in fields.items()}
        self._write("data", state, values)

    def say_step(self, state: TrainState, outcome: StepOutcome, guard: LossGuard) -> None:
        """One line of metrics; now and then one on the console."""
        values = self._describe(outcome, guard)
        self._write("train", state, values)
        self.console.say_step(state, values)
        if time.monotonic() - self._status_written >= STATUS_SECONDS:
            self.say_phase(RunPhase.running, state)

    def say_heldout(self, state: TrainState, stats: LossStats) -> None:
        """Held-out losses."""
        self._write("heldout", state, asdict(stats))
        self.console.say_heldout(state, stats)

    def has_heldout(self, state: TrainState) -> bool:
        """Whether the held-out losses of this step are written down already. On rank 0."""
        return any(line["step"] == state.step for line in load_metrics(self.config.run.dir, "heldout"))

    def say_restored(self, state: TrainState, restore_seconds: float, verify_seconds: float) -> None:
        """A checkpoint was read. verify_seconds: of comparing checksums, before."""
        self._write("restore", state, {"restore_seconds": restore_seconds, "verify_seconds": verify_seconds})
        logger.info(f"checkpoint read in {restore_seconds:.1f} s, its checksums in {verify_seconds:.1f} s before")

    def say_saved(self, state: TrainState, saves: Iterable[SaveReport]) -> None:
        """Checkpoints that are complete."""
        for save in saves:
            values = {
                "saved_step": save.step,
                "save_seconds": save.save_seconds,
                "write_seconds": save.write_seconds,
                "bytes": save.num_bytes,
            }
            self._write("checkpoint", state, values)
            logger.info(
                f"step {save.step}: checkpoint of {save.num_bytes / 1e9:.2f} GB complete after "
                f"{save.write_seconds:.1f} s, of which training waited {save.save_seconds:.1f} s"
            )

    def say_event(self, event: str, state: TrainState, message: str, samples: range | None = None) -> None:
        """Something a person should know. samples: global sample indices it is about."""
        values: dict[str, Any] = {"event": event, "message": message}
        if samples is not None:
            values |= {"sample_first": samples[0], "sample_last": samples[-1]}
            message += f" (samples {samples[0]} to {samples[-1]})"
        self._write("event", state, values)
        if self.session.ranks.is_first:
            logger.warning(f"step {state.step}: {message}")

    def go_back(self, state: TrainState) -> None:
        """The run continues from an earlier step: metrics of later ones are dropped."""
        self.session.metrics.drop_after(state.step)

    def _write(self, kind: str, state: TrainState, values: dict[str, Any]) -> None:
        self.session.metrics.write(kind, state.step, state.tokens_seen, values)

    def _describe(self, outcome: StepOutcome, guard: LossGuard) -> dict[str, Any]:
        config, counts, seconds = self.config, outcome.counts, outcome.seconds
        flops = compute_step_flops(config.model, counts.positions, counts.attended_pairs, counts.clean + counts.masked)
        ranks = self.session.ranks
        peak = find_peak_flops(ranks.device)
        own = outcome.beat.seconds
        slowest = max(range(len(own)), key=own.__getitem__)
        return {
            **asdict(outcome.stats),
            "text_tokens": counts.text,
            "context_tokens": counts.prompt,
            "block_padding_tokens": counts.block_padding,
            "padding_tokens": counts.padding,
            "padding_share": counts.padding / config.tokens_per_step,
            "masked_tokens": counts.masked,
            "grad_norm": outcome.grad_norm,
            "lr": outcome.learning_rate,
            "step_seconds": seconds,
            "data_seconds": outcome.data_seconds,
            "tokens_per_second": config.tokens_per_step / seconds,
            "model_flops_per_second": flops / seconds,
            "mfu": flops / seconds / (peak * ranks.world_size) if peak else None,
            "memory_bytes": measure_memory_bytes(ranks.device),
            "skipped": int(not outcome.applied),
            "nonfinite_steps": guard.nonfinite,
            "spikes": guard.spikes,
            "slowest_rank": slowest,
            "slowest_ratio": own[slowest] / max(median_low(own), 1e-9),
        }


def describe_bad_step(verdict: Verdict, stats: LossStats, guard: LossGuard, grad_norm: float, applied: bool) -> str:
    """One sentence on a step that was not good."""
    what = "its update is applied" if applied else "its update is left out"
    if verdict is Verdict.nonfinite:
        return f"loss {stats.loss:.4g} with a gradient norm of {grad_norm:.4g}: {what}"
    return f"loss {stats.loss:.4g} is a spike, above {guard.limit:.4g}: {what}"
