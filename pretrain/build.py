"""The parts around the model that a Trainer is made of, from the configuration."""

from pathlib import Path

from conf.schema import RunConfig
from data_pipeline.loader import BatchLoader
from data_pipeline.noise import NoiseSource
from model.attention.plan import PlanBuilder
from pretrain.reporting.console import Console
from pretrain.reporting.metrics import MetricsWriter
from pretrain.reporting.report import RunReport
from pretrain.reporting.reporters import open_reporters
from pretrain.resume.start import StartPoint
from pretrain.run.data import HELDOUT_SEED, RunData, count_samples
from pretrain.run.distributed import Ranks
from pretrain.run.run_folder import plain
from pretrain.run.state import TrainState
from pretrain.run.status import StatusWriter
from pretrain.step.evaluation import HeldoutEvaluation
from pretrain.step.microbatches import MicrobatchBuilder


def build_report(config: RunConfig, ranks: Ranks, console: Console, start: StartPoint) -> RunReport:
    if not ranks.is_first:
        return RunReport(config, ranks, console, metrics=None, status=None)
    run_dir, step, runtime = Path(config.run.dir), start.state.step, config.runtime
    reporters = open_reporters(
        run_dir, step, tensorboard=runtime.tensorboard, wandb_project=runtime.wandb_project, config=plain(config)
    )
    return RunReport(config, ranks, console, MetricsWriter(run_dir, step, reporters), StatusWriter(run_dir))


def build_loader(config: RunConfig, data: RunData, state: TrainState, ranks: Ranks) -> BatchLoader:
    return BatchLoader(
        data.train,
        config.train.global_batch_size,
        config.train.micro_batch_size,
        ranks.data_parallel_rank,
        ranks.data_parallel_size,
        config.data.prefetch_steps,
        count_samples(config, state),
    )


def build_microbatch_builder(config: RunConfig, data: RunData, plans: PlanBuilder, split: str) -> MicrobatchBuilder:
    seed = HELDOUT_SEED if split == "heldout" else config.train.seed
    noise = NoiseSource(seed, config.stage.name, split, config.stage.noise_epsilon)
    return MicrobatchBuilder(config.stage, noise, data.tokenizer.mask_token_id, plans)


def build_evaluation(config: RunConfig, data: RunData, plans: PlanBuilder) -> HeldoutEvaluation | None:
    if data.heldout is None:
        return None
    builder = build_microbatch_builder(config, data, plans, "heldout")
    num_sequences = min(config.evaluation.sequences, data.heldout.num_samples_without_repeats)
    return HeldoutEvaluation(data.heldout, builder, num_sequences, config.train.micro_batch_size)
