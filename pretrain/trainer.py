"""The training loop of the AR, joint and SFT stages."""

import logging
import math
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
from model.attention.context import find_context_shard
from model.attention.plan import PlanBuilder
from model.checkpoint.layout import load_checkpoint_manifest
from model.megatron.build import build_model_chunks, count_parameters
from model.megatron.transformer_config import TORCH_DTYPES
from pretrain.build import build_evaluation, build_loader, build_microbatch_builder
from pretrain.checkpointing.checkpointer import Checkpointer
from pretrain.checkpointing.sharded_state import load_checkpoint
from pretrain.health.guard import LossGuard, Verdict
from pretrain.health.heartbeat import OwnTime, Stragglers, exchange
from pretrain.health.watchdog import Watchdog
from pretrain.objective.losses import LossStats
from pretrain.reporting.console import Console
from pretrain.reporting.report import RunReport, StepOutcome, describe_bad_step
from pretrain.resume.data_change import with_order
from pretrain.resume.start_point import StartPoint, agree_on_start, build_manifest, load_initial_weights
from pretrain.run import stop
from pretrain.run.integrity import find_intact_checkpoint
from pretrain.run.model_parallel import model_parallel_groups
from pretrain.run.process_group import Ranks, decide_on_first_rank, run_on_first_rank
from pretrain.run.run_data import RunData, copy_tokenizer, count_samples, open_data
from pretrain.run.run_folder import record_run
from pretrain.run.run_status import RunPhase, TrainState
from pretrain.run.session import RunSession
from pretrain.run.start_record import record_start
from pretrain.run.step_directory import SaveError
from pretrain.run.terminal import start_console_logging
from pretrain.step.evaluation import HeldoutEvaluation
from pretrain.step.learning_rate import compute_learning_rate
from pretrain.step.microbatches import MicrobatchBuilder
from pretrain.step.optimizer import (
    build_optimizer,
    compute_grad_norm,
    set_hyperparameters,
    update_weights,
    wrap_data_parallel,
)
from pretrain.step.schedule import run_schedule
from pretrain.step.userbuffers import userbuffers

logger = logging.getLogger(__name__)


def run_training(config: RunConfig) -> int:
    """Trains (or continues) the run that `config` describes; returns the exit status of the process.

    0: complete. EXIT_STOPPED or EXIT_INTERRUPTED: a signal came, everything is saved. Raises UserError for what the
    user must change.
    """
    start_console_logging()
    data = open_data(config)
    groups = model_parallel_groups(config.parallel, config.runtime.timeout_minutes, config.train.seed)
    with RunSession(Path(config.run.dir), config.runtime) as session, groups, userbuffers(config):
        return build_trainer(config, data, agree_on_start(config, data), session).run()


def build_trainer(config: RunConfig, data: RunData, start: StartPoint, session: RunSession) -> "Trainer":
    """Model, optimizer and everything around them, with weights (and optimizer state, when resuming) loaded."""
    run_dir, ranks, data = session.run_dir, session.ranks, with_order(data, start.order)
    console = Console(config, session)
    run_on_first_rank(lambda: _keep_records(config, data, start, ranks))
    chunks = build_model_chunks(config.model, config.parallel, config.precision, config.runtime.loss_chunk_rows)
    chunks = [chunk.to(ranks.device) for chunk in chunks]
    console.say_start(start, count_parameters(chunks))
    for line in start.describe_changes():
        logger.info(line)
    if start.step_dir is None:
        load_initial_weights(config, start, chunks)
    own_time = OwnTime(ranks.device)
    model = wrap_data_parallel(chunks, config.parallel, own_time.gradients_ready)
    optimizer = build_optimizer(model, config.optimizer, config.parallel, config.precision)
    session.open_metrics(start.state.step, config, wandb_project=config.runtime.wandb_project)
    report = RunReport(config, session, console)
    for message in start.set_aside:
        report.say_event("corrupt_checkpoint", start.state, message)
    guard = LossGuard(config.guard)
    guard.restore(start.guard)
    if start.step_dir is not None:
        began = time.perf_counter()
        load_checkpoint(start.step_dir, model, optimizer)
        report.say_restored(start.state, time.perf_counter() - began, start.verify_seconds)
    plans = PlanBuilder(
        config.model,
        config.runtime.attention_backend,
        TORCH_DTYPES[config.precision.dtype],
        ranks.device,
        find_context_shard(config.stage.block_size),
    )
    return Trainer(
        config=config,
        data=data,
        ranks=ranks,
        model=model,
        optimizer=optimizer,
        state=start.state,
        start=start,
        loader=build_loader(config, data, start.state),
        builder=build_microbatch_builder(config, data, plans, "train"),
        evaluation=build_evaluation(config, data, plans),
        checkpointer=Checkpointer(run_dir, model, optimizer, config.checkpoint.keep, config.checkpoint.asynchronous),
        guard=guard,
        own_time=own_time,
        stragglers=Stragglers(config.runtime.straggler_factor),
        watchdog=Watchdog(run_dir, ranks.rank, config.runtime.stall_timeout_minutes),
        report=report,
    )


def _keep_records(config: RunConfig, data: RunData, start: StartPoint, ranks: Ranks) -> None:
    run_dir = Path(config.run.dir)
    record_run(config, run_dir, start.state.step)
    record_start(config, run_dir, ranks.world_size, start.list_changes())
    copy_tokenizer(config, data)


@dataclass
class Trainer:
    """One run in progress. model: this rank's wrapped chunks."""

    config: RunConfig
    data: RunData
    ranks: Ranks
    model: list[Any]
    optimizer: MegatronOptimizer
    state: TrainState
    start: StartPoint
    loader: BatchLoader
    builder: MicrobatchBuilder
    evaluation: HeldoutEvaluation | None
    checkpointer: Checkpointer
    guard: LossGuard
    own_time: OwnTime
    stragglers: Stragglers
    watchdog: Watchdog
    report: RunReport

    def run(self) -> int:
        """Trains until the token budget is spent or a signal comes; evaluates and saves on the way and at the end.

        Returns the exit status of the process.
        """
        try:
            with self.watchdog.watching(), stop.deferred(), self.report.console.progress(self.state):
                status = self._train()
        except BaseException as error:
            self.report.say_phase(RunPhase.failed, self.state, str(error) or type(error).__name__)
            raise
        return status

    def _train(self) -> int:
        done_before = self.is_finished
        self.report.say_phase(RunPhase.running, self.state)
        if not done_before:
            self.report.say_data(self.data, self.state)
        if self._owes_evaluation():
            self.evaluate()
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
                self._save_safely(self.save)
        self._save_safely(self.checkpointer.finish)
        self.report.console.say_end(self.state, done_before)
        self.report.say_phase(RunPhase.complete, self.state)
        return 0

    @property
    def is_finished(self) -> bool:
        """Whether another step would exceed the token budget."""
        budget = max(self.config.train.tokens, self.config.tokens_per_step)
        return self.state.tokens_seen + self.config.tokens_per_step > budget

    def train_step(self) -> int:
        """One optimizer step on the next global batch. Returns the signal that some rank was sent, or 0."""
        self.watchdog.alive()
        started = time.perf_counter()
        first = self.state.samples_seen
        batches = self.loader.microbatches(first)
        data_seconds = time.perf_counter() - started
        step = self.builder.prepare(batches)
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.own_time.start()
        sums = run_schedule(self.model, step, forward_only=False)
        stats = LossStats.from_sums(sums, step.counts, self.config.stage)
        learning_rate = self._learning_rate()
        set_hyperparameters(self.optimizer, self.config.optimizer, learning_rate)
        norm = compute_grad_norm(self.optimizer)
        grad_norm = float(norm)
        verdict = self.guard.judge(stats.loss, math.isfinite(grad_norm))
        seconds = data_seconds + self.own_time.seconds
        beat = exchange(stop.received() or 0, verdict, seconds, self.ranks.device)
        applied = self.guard.applies(beat.verdict)
        if applied:
            update_weights(self.optimizer, norm)
        self.state.step += 1
        self.state.samples_seen += self.config.train.global_batch_size
        self.state.tokens_seen += self.config.tokens_per_step
        seconds = time.perf_counter() - started
        outcome = StepOutcome(stats, step.counts, grad_norm, learning_rate, seconds, data_seconds, beat, applied)
        self._conclude(outcome, range(first, self.state.samples_seen))
        return beat.signal

    def _conclude(self, outcome: StepOutcome, samples: range) -> None:
        """Says what happened in a step, and draws the consequences of a bad one."""
        verdict, stats = outcome.beat.verdict, outcome.stats
        if verdict is not Verdict.good:
            message = describe_bad_step(verdict, stats, self.guard, outcome.grad_norm, outcome.applied)
            self.report.say_event(verdict.name, self.state, message, samples)
        for rank, late in self.stragglers.update(outcome.beat.seconds, self.state.step):
            message = f"rank {rank} takes {late:.1f} times as long as its peers until its gradients are ready"
            self.report.say_event("straggler", self.state, message)
        self.guard.count(verdict, stats.loss, self.state.step)
        self.report.say_step(self.state, outcome, self.guard)
        if verdict is Verdict.spike and self.config.guard.spike_policy is SpikePolicy.roll_back:
            self._roll_back()

    def _roll_back(self) -> None:
        """Weights and optimizer of the newest checkpoint; the data since are left out."""
        self._save_safely(self.checkpointer.finish)
        step_dir = find_intact_checkpoint(Path(self.config.run.dir))
        if step_dir is None:
            self.report.say_event("rollback", self.state, "there is no checkpoint yet to go back to")
            return
        manifest, left_at = load_checkpoint_manifest(step_dir), self.state.step
        left_out = range(manifest.samples_seen, self.state.samples_seen)
        load_checkpoint(step_dir, self.model, self.optimizer)
        self.state = TrainState(manifest.step, manifest.tokens_seen, self.state.samples_seen)
        self.checkpointer.last_step = manifest.step
        self.loader.num_samples = count_samples(self.config, self.state)
        spikes = self.guard.spikes
        self.guard.restore({**manifest.guard, "spikes": spikes})
        self.report.go_back(self.state)
        message = f"back from step {left_at} after a loss spike (number {spikes}); the data in between are left out"
        self.report.say_event("rollback", self.state, message, left_out)

    def _owes_evaluation(self) -> bool:
        """Whether one is due at the step the run begins with: a run that is stopped saves and does not evaluate."""
        is_due = self.state.step == 0 or self._is_due(self.config.evaluation.every_steps)
        return is_due and decide_on_first_rank(lambda: not self.report.has_heldout(self.state))

    def evaluate(self) -> None:
        """Held-out losses, into metrics and console; nothing without held-out data."""
        self.watchdog.alive()
        if self.evaluation is not None:
            self.report.say_heldout(self.state, self.evaluation.run(self.model))

    def save(self) -> None:
        """Saves a checkpoint of this moment. Raises: SaveError."""
        self.watchdog.alive()
        self._save_safely(self.checkpointer.finish)
        manifest = build_manifest(self.config, self.data, self.state, self.start, self.guard.state)
        self.checkpointer.save(manifest)

    def _save_safely(self, action: Callable[[], None], is_last: bool | None = None) -> None:
        """What a failed save means is for the configuration to say, unless it was the run's last one.

        is_last: True, nothing would come after it, so that it must work; False, another save comes at once.
        """
        try:
            action()
        except SaveError as error:
            self.report.say_event("save_failed", self.state, str(error))
            was_final = self.is_finished and self.checkpointer.begun_step == self.state.step
            ends = was_final or self.config.checkpoint.on_failure is SaveFailure.stop
            if ends if is_last is None else is_last:
                raise
        self.report.say_saved(self.state, self.checkpointer.take_reports())

    def _stop(self, signal: Signals) -> int:
        """Saves and returns the status that says so."""
        self.report.say_event("stop", self.state, f"{signal.name} received: saving, then ending")
        self._save_safely(self.checkpointer.finish, is_last=False)
        if self.checkpointer.last_step != self.state.step:
            self._save_safely(self.save, is_last=True)
            self._save_safely(self.checkpointer.finish, is_last=True)
        self.report.say_phase(RunPhase.stopped, self.state, signal.name)
        dist.barrier()  # launchers end the other ranks when the first one is gone
        return stop.STATUS[signal]

    def _learning_rate(self) -> float:
        tokens_after = self.state.tokens_seen + self.config.tokens_per_step
        return compute_learning_rate(self.config.schedule, tokens_after / self.config.train.tokens)

    def _is_due(self, every_steps: int) -> bool:
        return self.is_finished or self.state.is_multiple_of(every_steps)
