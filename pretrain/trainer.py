"""The training loop of the AR, joint and SFT stages."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from conf.schema import RunConfig, SaveFailure, SpikePolicy
from data_pipeline.loader import BatchLoader
from model.checkpoint.layout import load_checkpoint_manifest
from pretrain.checkpointing.checkpointer import Checkpointer
from pretrain.health.guard import LossGuard, StepVerdict
from pretrain.health.heartbeat import Heartbeat, Watchdog
from pretrain.objective.losses import LossStats, join_numbers
from pretrain.reporting.run_report import RunReport, StepOutcome
from pretrain.run import stop
from pretrain.run.integrity import find_intact_checkpoint
from pretrain.run.process_group import decide_on_first_rank
from pretrain.run.run_data import count_samples
from pretrain.run.run_status import RunPhase, TrainState
from pretrain.run.step_directory import SaveError
from pretrain.step.evaluation import HeldoutEvaluation
from pretrain.step.learning_rate import compute_learning_rate
from pretrain.step.microbatches import MicrobatchBuilder
from pretrain.step.optimizer import compute_grad_norm, set_hyperparameters, update_weights
from pretrain.step.rehearsal import rehearse
from pretrain.step.schedule import run_schedule


@dataclass
class Trainer:
    """Runs the steps of one training; pretrain/assemble.py builds it. model: this rank's wrapped chunks."""

    config: RunConfig
    model: list[Any]
    optimizer: MegatronOptimizer
    state: TrainState
    loader: BatchLoader
    builder: MicrobatchBuilder
    evaluation: HeldoutEvaluation | None
    checkpointer: Checkpointer
    guard: LossGuard
    heartbeat: Heartbeat
    watchdog: Watchdog
    report: RunReport

    def run(self) -> int:
        """Train until the token budget is spent or a signal comes; evaluate and save on the way and at the end.

        Returns the exit status of the process.
        """
        try:
            with self.watchdog.watching(), stop.deferred(), self.report.showing_progress(self.state):
                return self._train()
        except BaseException as error:
            self.report.write_phase(RunPhase.failed, self.state, str(error) or type(error).__name__)
            raise

    def _train(self) -> int:
        done_before = self.is_finished
        self.report.write_phase(RunPhase.running, self.state)
        if self._owes_evaluation():
            self.evaluate()
        self.prepare_kernels()
        while not self.is_finished:
            signal = self.train_step()
            self._save_safely(self.checkpointer.poll)
            if signal:
                return self._stop(Signals(signal))
            if self.state.step == self.checkpointer.last_step:
                continue  # rolled back: this moment was evaluated and saved before
            if self._is_due(self.config.evaluation.every_steps):
                self.evaluate()
            if self._is_due(self.config.checkpoint.every_steps):
                self._save_safely(self.save, SaveFailure.stop if self.is_finished else None)
        self._save_safely(self.checkpointer.finish, SaveFailure.stop)
        self.report.write_end(self.state, done_before)
        self.report.write_phase(RunPhase.complete, self.state)
        return 0

    @property
    def is_finished(self) -> bool:
        """Whether another step would exceed the token budget."""
        budget = max(self.config.train.tokens, self.config.tokens_per_step)
        return self.state.tokens_seen + self.config.tokens_per_step > budget

    def prepare_kernels(self) -> None:
        """Let a device's kernels be compiled, or loaded, for all lengths that steps will have."""
        self.watchdog.alive()
        if self.builder.plans.device.type == "cuda" and self.builder.noisy_lengths and not self.is_finished:
            rehearse(self.model, self.builder, self.loader.microbatches(self.state.samples_seen)[0])

    def train_step(self) -> int:
        """Train one optimizer step on the next global batch. Returns the signal that some rank received, or 0."""
        self.watchdog.alive()
        started = time.perf_counter()
        first = self.state.samples_seen
        batches = self.loader.microbatches(first)
        data_seconds = time.perf_counter() - started
        step = self.builder.prepare(batches)
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.heartbeat.start()
        sums = run_schedule(self.model, step, forward_only=False)
        learning_rate = self._learning_rate()
        set_hyperparameters(self.optimizer, self.config.optimizer, self.config.stage, learning_rate)
        norm = compute_grad_norm(self.optimizer)
        recompiled = self.report.count_compilations(self.state)
        joined = join_numbers(sums, step.counts, norm)
        beat = self.heartbeat.exchange(stop.received() or 0, data_seconds, recompiled, joined)
        numbers = beat.numbers[dist.get_rank()]
        stats = LossStats.from_sums(numbers.sums, numbers.counts, self.config.stage)
        verdict = self.guard.judge_worst(beat.numbers)
        applied = self.guard.applies(verdict)
        if applied:
            update_weights(self.optimizer, norm)
        self.state.step += 1
        self.state.samples_seen += self.config.train.global_batch_size
        self.state.tokens_seen += self.config.tokens_per_step
        seconds = time.perf_counter() - started
        dealt, num_lengths = self.loader.deal(first), len(self.builder.met_lengths)
        outcome = StepOutcome(
            stats, numbers, learning_rate, seconds, data_seconds, beat, verdict, applied, dealt, num_lengths
        )
        self._conclude(outcome, range(first, self.state.samples_seen))
        return beat.signal

    def _conclude(self, outcome: StepOutcome, samples: range) -> None:
        """Report what happened in a step, and go back if a spike asks for it."""
        verdict, stats = outcome.verdict, outcome.stats
        if verdict is not StepVerdict.good:
            self.report.write_bad_step(self.state, outcome, self.guard, samples)
        self.guard.count(verdict, stats.loss, self.state.step)
        self.report.write_step(self.state, outcome, self.guard)
        if verdict is StepVerdict.spike and self.config.guard.spike_policy is SpikePolicy.roll_back:
            self._roll_back()

    def _roll_back(self) -> None:
        """Go back to weights and optimizer of the newest checkpoint; the data since are left out."""
        self._save_safely(self.checkpointer.finish)
        step_dir = find_intact_checkpoint(Path(self.config.run.dir))
        if step_dir is None:
            self.report.write_event("rollback", self.state, "there is no checkpoint yet to go back to")
            return
        manifest, left_at = load_checkpoint_manifest(step_dir), self.state.step
        left_out = range(manifest.samples_seen, self.state.samples_seen)
        self.checkpointer.load(step_dir)
        self.state = TrainState(manifest.step, manifest.tokens_seen, self.state.samples_seen)
        self.loader.num_samples = count_samples(self.config, self.state)
        self.guard.go_back(manifest.guard)
        self.report.go_back(self.state)
        number = self.guard.spikes
        message = f"back from step {left_at} after a loss spike (number {number}); the data in between are left out"
        self.report.write_event("rollback", self.state, message, left_out)

    def _owes_evaluation(self) -> bool:
        """Return whether the step the run begins with is to be evaluated: a stopped run saves and does not evaluate."""
        is_due = self.state.step == 0 or self._is_due(self.config.evaluation.every_steps)
        return is_due and decide_on_first_rank(lambda: not self.report.has_heldout(self.state))

    def evaluate(self) -> None:
        """Write held-out losses into metrics and log; nothing without held-out data."""
        self.watchdog.alive()
        if self.evaluation is not None:
            self.report.write_heldout(self.state, self.evaluation.run(self.model))

    def save(self) -> None:
        """Save a checkpoint of this moment. Raises: SaveError."""
        self.watchdog.alive()
        self._save_safely(self.checkpointer.finish)
        self.checkpointer.save(self.state, self.guard.state)

    def _save_safely(self, action: Callable[[], None], on_failure: SaveFailure | None = None) -> None:
        """Run `action`, which saves. on_failure: what a failure leads to, where the configuration does not decide it.

        A run's last save must work (stop); one after which another comes at once may fail (go_on).
        """
        try:
            action()
        except SaveError as error:
            self.report.write_event("save_failed", self.state, str(error))
            if (on_failure or self.config.checkpoint.on_failure) is SaveFailure.stop:
                raise
        self.report.write_saved(self.state, self.checkpointer.take_reports())

    def _stop(self, signal: Signals) -> int:
        """Save and return the exit status of a stopped run."""
        self.report.write_event("stop", self.state, f"{signal.name} received: saving, then ending")
        self._save_safely(self.checkpointer.finish, SaveFailure.go_on)
        if self.checkpointer.last_step != self.state.step:
            self._save_safely(self.save, SaveFailure.stop)
            self._save_safely(self.checkpointer.finish, SaveFailure.stop)
        self.report.write_phase(RunPhase.stopped, self.state, signal.name)
        dist.barrier()  # launchers end the other ranks when the first one is gone
        return stop.STATUS[signal]

    def _learning_rate(self) -> float:
        tokens_after = self.state.tokens_seen + self.config.tokens_per_step
        return compute_learning_rate(self.config.schedule, tokens_after / self.config.train.tokens)

    def _is_due(self, every_steps: int) -> bool:
        return self.is_finished or self.state.is_multiple_of(every_steps)
