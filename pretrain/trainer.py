"""The training loop of the AR, joint and SFT stages."""

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from conf.schema import Objective, RunConfig
from data_pipeline.loader import BatchLoader
from data_pipeline.noise import NoiseSource
from model.attention.plan import PlanBuilder
from model.build import build_model_chunks, count_parameters
from model.transformer_config import TORCH_DTYPES
from pretrain.checkpoint import Checkpointer, load_checkpoint
from pretrain.console import Console
from pretrain.data import HELDOUT_SEED, RunData, copy_tokenizer, open_data
from pretrain.distributed import Ranks, distributed_session
from pretrain.evaluation import HeldoutEvaluation
from pretrain.flops import compute_step_flops, find_peak_flops
from pretrain.logs import start_console_logging, start_logging
from pretrain.metrics import MetricsWriter, measure_memory_bytes
from pretrain.microbatches import MicrobatchBuilder
from pretrain.objective.losses import LossStats
from pretrain.objective.rows import StepCounts
from pretrain.optimizer import build_optimizer, set_hyperparameters, wrap_data_parallel
from pretrain.run_folder import lock_run_folder, record_run
from pretrain.schedule import compute_learning_rate
from pretrain.start import StartPoint, build_manifest, find_start, load_initial_weights, share_start
from pretrain.state import TrainState
from pretrain.step import run_schedule


def run_training(config: RunConfig) -> None:
    """Trains (or continues) the run that `config` describes. Raises UserError for what the user must change."""
    start_console_logging()
    data = open_data(config)
    start = find_start(config, data)
    session = distributed_session(config.parallel, config.runtime, config.train.seed)
    with session as ranks, lock_run_folder(Path(config.run.dir)) if ranks.is_first else nullcontext():
        build_trainer(config, data, share_start(start), ranks).run()


def build_trainer(config: RunConfig, data: RunData, start: StartPoint, ranks: Ranks) -> "Trainer":
    """Model, optimizer and everything around them, with weights (and optimizer state, when resuming) loaded."""
    run_dir = Path(config.run.dir)
    console = Console(config, ranks)
    if ranks.is_first:
        record_run(config, run_dir, start.state.step)
        copy_tokenizer(config, data)
    start_logging(run_dir, console.rich, ranks.is_first)
    chunks = build_model_chunks(config.model, config.parallel, config.precision, config.runtime.loss_chunk_rows)
    chunks = [chunk.to(ranks.device) for chunk in chunks]
    console.say_start(start, count_parameters(chunks))
    if start.step_dir is None:
        load_initial_weights(config, start, chunks)
    model = wrap_data_parallel(chunks, config.parallel)
    optimizer = build_optimizer(model, config.optimizer, config.parallel, config.precision)
    if start.step_dir is not None:
        load_checkpoint(start.step_dir, model, optimizer)
    plans = PlanBuilder(
        config.model, config.runtime.attention_backend, TORCH_DTYPES[config.precision.dtype], ranks.device
    )
    return Trainer(
        config=config,
        data=data,
        ranks=ranks,
        model=model,
        optimizer=optimizer,
        state=start.state,
        start=start,
        loader=_build_loader(config, data, ranks),
        builder=_build_microbatch_builder(config, data, plans, "train"),
        evaluation=_build_evaluation(config, data, plans),
        checkpointer=Checkpointer(run_dir, model, optimizer, config.checkpoint.keep, config.checkpoint.asynchronous),
        metrics=MetricsWriter(run_dir, start.state.step, config.runtime.tensorboard) if ranks.is_first else None,
        console=console,
    )


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
    metrics: MetricsWriter | None
    console: Console

    def run(self) -> None:
        """Trains until the token budget is spent; evaluates and saves on the way and at the end."""
        done_before = self.is_finished
        if not done_before:
            self._report_data()
        with self.console.progress(self.state):
            if self.state.step == 0:
                self.evaluate()
            while not self.is_finished:
                self.train_step()
                self.checkpointer.poll()
                if self._is_due(self.config.evaluation.every_steps):
                    self.evaluate()
                if self._is_due(self.config.checkpoint.every_steps):
                    self.save()
            self.checkpointer.finish()
        self.console.say_end(self.state, done_before)
        if self.metrics is not None:
            self.metrics.close()

    @property
    def is_finished(self) -> bool:
        """Whether another step would exceed the token budget."""
        budget = max(self.config.train.tokens, self.config.tokens_per_step)
        return self.state.tokens_seen + self.config.tokens_per_step > budget

    def train_step(self) -> None:
        """One optimizer step on the next global batch."""
        started = time.perf_counter()
        batches = self.loader.microbatches(self.state.samples_seen)
        data_seconds = time.perf_counter() - started
        step = self.builder.prepare(batches)
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = run_schedule(self.model, step, forward_only=False)
        learning_rate = self._learning_rate()
        set_hyperparameters(self.optimizer, self.config.optimizer, learning_rate)
        _, grad_norm, _ = self.optimizer.step()  # type: ignore[misc]
        self.state.advance(self.config.train.global_batch_size, self.config.data.sequence_length)
        stats = LossStats.from_sums(sums, step.counts, self._is_joint)
        seconds = time.perf_counter() - started
        self._report(stats, step.counts, float(grad_norm or 0.0), learning_rate, seconds, data_seconds)

    def evaluate(self) -> None:
        """Held-out losses, into metrics and console; nothing without held-out data."""
        if self.evaluation is None:
            return
        stats = self.evaluation.run(self.model)
        if self.metrics is not None:
            self.metrics.write("heldout", self.state.step, self.state.tokens_seen, asdict(stats))
        self.console.say_heldout(self.state, stats)

    def save(self) -> None:
        """Saves a checkpoint of this moment."""
        started = time.perf_counter()
        self.checkpointer.save(build_manifest(self.config, self.data, self.state, self.start))
        self.console.say_saved(self.state, time.perf_counter() - started)

    def _learning_rate(self) -> float:
        tokens_after = self.state.tokens_seen + self.config.tokens_per_step
        return compute_learning_rate(self.config.schedule, tokens_after / self.config.train.tokens)

    def _is_due(self, every_steps: int) -> bool:
        return self.is_finished or (every_steps > 0 and self.state.step % every_steps == 0)

    @property
    def _is_joint(self) -> bool:
        return self.config.stage.objective is Objective.joint

    def _report_data(self) -> None:
        """What an epoch of each source holds and what was left out, once per start."""
        self.console.say_data(self.data)
        if self.metrics is not None:
            counts = {name: asdict(source.counts) for name, source in self.data.train.sources.items()}
            values = {f"{name}/{key}": value for name, fields in counts.items() for key, value in fields.items()}
            self.metrics.write("data", self.state.step, self.state.tokens_seen, values)

    def _report(
        self,
        stats: LossStats,
        counts: StepCounts,
        grad_norm: float,
        learning_rate: float,
        seconds: float,
        data_seconds: float,
    ) -> None:
        config = self.config
        flops = compute_step_flops(config.model, counts.rows, counts.pairs, counts.clean + counts.masked)
        peak = find_peak_flops(self.ranks.device)
        values = {
            **asdict(stats),
            "text_tokens": counts.text,
            "context_tokens": counts.context,
            "completion_tokens": counts.completion,
            "filler_rows": counts.filler,
            "filler_share": counts.filler / config.tokens_per_step,
            "masked_tokens": counts.masked,
            "grad_norm": grad_norm,
            "lr": learning_rate,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "tokens_per_second": config.tokens_per_step / seconds,
            "model_flops_per_second": flops / seconds,
            "mfu": flops / seconds / (peak * dist.get_world_size()) if peak else None,
            "memory_bytes": measure_memory_bytes(self.ranks.device),
        }
        if self.metrics is not None:
            self.metrics.write("train", self.state.step, self.state.tokens_seen, values)
        self.console.say_step(self.state, values)


def _build_loader(config: RunConfig, data: RunData, ranks: Ranks) -> BatchLoader:
    return BatchLoader(
        data.train,
        config.train.global_batch_size,
        config.train.micro_batch_size,
        ranks.data_parallel_rank,
        ranks.data_parallel_size,
        config.data.prefetch_steps,
        config.num_steps * config.train.global_batch_size,
    )


def _build_microbatch_builder(config: RunConfig, data: RunData, plans: PlanBuilder, split: str) -> MicrobatchBuilder:
    seed = HELDOUT_SEED if split == "heldout" else config.train.seed
    noise = NoiseSource(seed, config.stage.name, split, config.stage.noise_epsilon)
    return MicrobatchBuilder(config.stage, noise, data.tokenizer.mask_token_id, plans)


def _build_evaluation(config: RunConfig, data: RunData, plans: PlanBuilder) -> HeldoutEvaluation | None:
    if data.heldout is None:
        return None
    builder = _build_microbatch_builder(config, data, plans, "heldout")
    num_sequences = min(config.evaluation.sequences, data.heldout.num_samples_without_repeats)
    return HeldoutEvaluation(data.heldout, builder, num_sequences, config.train.micro_batch_size)
