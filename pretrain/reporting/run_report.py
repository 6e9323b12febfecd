"""What a run reports: metrics.jsonl, the log with its progress bar, and status.json. Only rank 0 writes."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from conf.schema import RunConfig
from data_pipeline.dealing import Deal
from pretrain.checkpointing.checkpointer import SaveReport
from pretrain.costs import compute_flop_rates, find_peak_flops
from pretrain.health.compilations import FIRST_STEPS, Compilation, CompilationCounter, describe_compilations
from pretrain.health.guard import LossGuard, StepVerdict
from pretrain.health.heartbeat import Beat, Stragglers
from pretrain.objective.losses import LossStats, StepNumbers
from pretrain.resume.start_point import StartPoint
from pretrain.run.metrics import load_metrics, measure_memory_bytes
from pretrain.run.run_data import RunData, count_samples, describe_blend, describe_overlap
from pretrain.run.run_status import RunPhase, TrainState, write_status
from pretrain.run.session import RunSession
from pretrain.run.terminal import describe_values

logger = logging.getLogger(__name__)

STATUS_SECONDS = 10.0  # between two refreshes of status.json while nothing but the step changes
MOST_RECOMPILATIONS = 10  # that are reported one by one; all are counted
EVERY_RANK_WAITS = f"every rank waited, after the first {FIRST_STEPS} steps; an input that varies should have one form"
LOGGED = ("loss", "ar_loss", "diffusion_loss", "grad_norm", "lr", "tokens_per_second")


@dataclass(frozen=True)
class StepOutcome:
    """Holds what came of one optimizer step.

    numbers: of this rank; the norm is that before clipping. applied: whether the weights were updated. seconds: of the
    whole step, data_seconds of them waiting for data. deal: of the global batch. num_noisy_lengths: that forwards of
    this rank have had since the start.
    """

    stats: LossStats
    numbers: StepNumbers
    learning_rate: float
    seconds: float
    data_seconds: float
    beat: Beat
    verdict: StepVerdict
    applied: bool
    deal: Deal
    num_noisy_lengths: int


class RunReport:
    """Writes what happens to a run into metrics.jsonl, the log and status.json. All ranks call it, rank 0 writes."""

    def __init__(
        self, config: RunConfig, session: RunSession, stragglers: Stragglers, kernels: CompilationCounter
    ) -> None:
        self._config, self._session, self._stragglers, self.kernels = config, session, stragglers, kernels
        self._metrics, self._ranks = session.metrics, session.ranks
        self._bar = session.progress_bar(f"{config.stage.name} stage")
        self._flop_rates, self._peak_flops = compute_flop_rates(config.model), find_peak_flops(session.ranks.device)
        self._status_written = float("-inf")
        self._num_recompilations = 0

    def write_start(self, start: StartPoint, parameters: int) -> None:
        """Log layout, size, where the run begins and what has changed; write events for damaged checkpoints."""
        config, origin = self._config, "fresh weights"
        if start.step_dir is not None:
            origin = f"resuming {start.step_dir} at step {start.state.step}"
        elif config.init_from:
            origin = f"weights from {config.init_from}"
        logger.info(
            f"{config.run.dir}: {config.num_steps} steps of {config.tokens_per_step} tokens, "
            f"{config.parallel.describe(self._ranks.world_size)}, {parameters / 1e6:.1f}M parameters on rank 0, "
            f"{self._ranks.device.type}; {origin}"
        )
        for line in start.describe_changes():
            logger.info(line)
        for message in start.set_aside:
            self.write_event("corrupt_checkpoint", start.state, message)

    def write_restored(self, state: TrainState, restore_seconds: float, verify_seconds: float) -> None:
        """Report a checkpoint that was read. verify_seconds: taken by comparing checksums, before."""
        self._write("restore", state, {"restore_seconds": restore_seconds, "verify_seconds": verify_seconds})
        logger.info(f"checkpoint read in {restore_seconds:.1f} s, its checksums in {verify_seconds:.1f} s before")

    def write_data(self, data: RunData, state: TrainState) -> None:
        """Report what an epoch of each source holds, what was left out, and how much of it the run will read."""
        for line in describe_blend(data.train, count_samples(self._config, state)):
            logger.info(line)
        if self._ranks.is_first:
            for line in describe_overlap(data):
                logger.warning(line)
        counts = {name: asdict(source.counts) for name, source in data.train.sources.items()}
        values = {f"{name}/{key}": value for name, fields in counts.items() for key, value in fields.items()}
        self._write("data", state, values)

    def showing_progress(self, state: TrainState) -> AbstractContextManager[None]:
        """Show a bar over the steps of the run while the block runs."""
        return self._bar.show(self._config.num_steps, state.step)

    def write_phase(self, phase: RunPhase, state: TrainState, reason: str = "") -> None:
        """Replace status.json."""
        if self._ranks.is_first:
            write_status(self._session.run_dir, phase, state, reason, self.kernels.counts)
            self._status_written = time.monotonic()

    def write_step(self, state: TrainState, outcome: StepOutcome, guard: LossGuard) -> None:
        """Write one line of metrics, now and then one of the log and status.json; name ranks that are slow."""
        ratios = self._stragglers.compare(outcome.beat.seconds)
        for rank, late in self._stragglers.update(ratios, state.step):
            message = f"rank {rank} takes {late:.1f} times as long as its peers until its gradients are ready"
            self.write_event("straggler", state, message)
        if self.kernels.new or any(outcome.beat.recompiled):
            self._write_compilations(state, dict(enumerate(outcome.beat.recompiled)))
        values = self._describe_step(outcome, guard, ratios)
        self._write("train", state, values)
        self._bar.update(state.step, f"loss {values['loss']:.4f} · {values['tokens_per_second']:.0f} tokens/s")
        if state.step % self._config.runtime.log_every_steps == 0:
            logger.info(f"step {state.step}: {describe_values(values, LOGGED)}")
        if time.monotonic() - self._status_written >= STATUS_SECONDS:
            self.write_phase(RunPhase.running, state)

    def write_bad_step(self, state: TrainState, outcome: StepOutcome, guard: LossGuard, samples: range) -> None:
        """Write an event for a spike, or for NaN or infinite gradients. samples: global sample indices of the step."""
        verdict, loss = outcome.verdict, outcome.stats.loss
        what = "its update is applied" if outcome.applied else "its update is left out"
        if verdict is StepVerdict.nonfinite:
            message = f"loss {loss:.4g} with a gradient norm of {outcome.numbers.grad_norm:.4g}: {what}"
        else:
            message = f"loss {loss:.4g} is a spike, above {guard.limit:.4g}: {what}"
        self.write_event(verdict.name, state, message, samples)

    def write_heldout(self, state: TrainState, stats: LossStats) -> None:
        """Write held-out losses into metrics and log."""
        self._write_compilations(state, {self._ranks.rank: self.kernels.read_evaluation()})
        self._write("heldout", state, asdict(stats))
        diffusion = "" if stats.diffusion_loss is None else f", diffusion_loss {stats.diffusion_loss:.4f}"
        logger.info(f"step {state.step}: held-out ar_loss {stats.ar_loss:.4f}{diffusion}")

    def has_heldout(self, state: TrainState) -> bool:
        """Return whether the held-out losses of this step are written already. Called on rank 0."""
        return any(line["step"] == state.step for line in load_metrics(self._session.run_dir, "heldout"))

    def write_saved(self, state: TrainState, saves: Iterable[SaveReport]) -> None:
        """Report checkpoints that are complete."""
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

    def write_event(self, event: str, state: TrainState, message: str, samples: range | None = None) -> None:
        """Report something a person should know. samples: global sample indices it is about."""
        values: dict[str, Any] = {"event": event, "message": message}
        if samples is not None:
            values |= {"sample_first": samples[0], "sample_last": samples[-1]}
            message += f" (samples {samples[0]} to {samples[-1]})"
        self._write("event", state, values)
        if self._ranks.is_first:
            logger.warning(f"step {state.step}: {message}")

    def count_compilations(self, state: TrainState) -> int:
        """Return how many kernels the step after `state` compiled although the first steps are over, on this rank."""
        return self.kernels.read_step(state.step) if self.kernels.is_pending else 0

    def _write_compilations(self, state: TrainState, recompiled: Mapping[int, int]) -> None:
        """Log what was compiled; write an event for what should not have been. recompiled: late kernels by rank."""
        new = self.kernels.take_new()
        if new:
            logger.info(f"step {state.step}: {describe_compilations(new)}")
        self.kernels.counts.recompiled_kernels += sum(recompiled.values())
        for message in self._describe_late(new, recompiled):
            self._num_recompilations += 1
            if self._num_recompilations > MOST_RECOMPILATIONS:
                return
            self.write_event("recompiled", state, f"{message}: {EVERY_RANK_WAITS}")
            if not self._ranks.is_first:
                logger.warning(f"step {state.step}: {message}: {EVERY_RANK_WAITS}")

    def _describe_late(self, new: list[Compilation], recompiled: Mapping[int, int]) -> Iterator[str]:
        """Yield a message per late kernel of this rank, and on rank 0 one per other rank that had some."""
        yield from (str(one) for one in new if one.is_late)
        others = {rank: number for rank, number in recompiled.items() if number and rank != self._ranks.rank}
        for rank, number in others.items() if self._ranks.is_first else ():
            yield f"rank {rank} compiled {number} kernels, which its log names"

    def go_back(self, state: TrainState) -> None:
        """Drop the metrics of later steps: the run continues from an earlier one."""
        self._metrics.drop_after(state.step)

    def write_end(self, state: TrainState, done_before: bool) -> None:
        """Log that the run is complete, now or since an earlier start."""
        more = "; nothing was left to do (a larger train.tokens would continue it)" if done_before else ""
        logger.info(f"{self._config.run.dir}: complete at step {state.step}, {state.tokens_seen} tokens{more}")

    def _write(self, kind: str, state: TrainState, values: dict[str, Any]) -> None:
        self._metrics.write(kind, state.step, state.tokens_seen, values)

    def _describe_step(self, outcome: StepOutcome, guard: LossGuard, ratios: dict[int, float]) -> dict[str, Any]:
        config, counts, seconds, peak = self._config, outcome.numbers.counts, outcome.seconds, self._peak_flops
        units = (
            *(counts.positions, counts.attended_pairs, counts.clean + counts.masked),
            *(counts.patches, counts.attended_patches),
        )
        flops = float(sum(rate * count for rate, count in zip(self._flop_rates, units, strict=True)))
        slowest = max(ratios, key=ratios.__getitem__)
        return {
            **asdict(outcome.stats),
            "text_tokens": counts.text,
            "context_tokens": counts.prompt,
            "block_padding_tokens": counts.block_padding,
            "padding_tokens": counts.padding,
            "padding_share": counts.padding / config.tokens_per_step,
            "masked_tokens": counts.masked,
            "useful_positions": counts.positions,
            "computed_positions": counts.computed_positions,
            "noisy_lengths": outcome.num_noisy_lengths,
            "rank_imbalance": outcome.deal.rank_imbalance,
            "undealt_rank_imbalance": outcome.deal.undealt_rank_imbalance,
            "microbatch_imbalance": outcome.deal.microbatch_imbalance,
            "undealt_microbatch_imbalance": outcome.deal.undealt_microbatch_imbalance,
            "images": counts.images,
            "image_patches": counts.patches,
            "grad_norm": outcome.numbers.grad_norm,
            "lr": outcome.learning_rate,
            "step_seconds": seconds,
            "data_seconds": outcome.data_seconds,
            "tokens_per_second": config.tokens_per_step / seconds,
            "model_flops_per_second": flops / seconds,
            "mfu": flops / seconds / (peak * self._ranks.world_size) if peak else None,
            "memory_bytes": measure_memory_bytes(self._ranks.device),
            **asdict(self.kernels.counts),
            "skipped": int(not outcome.applied),
            "nonfinite_steps": guard.nonfinite,
            "spikes": guard.spikes,
            "slowest_rank": slowest,
            "slowest_ratio": ratios[slowest],
        }
