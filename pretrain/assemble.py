"""Assembles a training run from its configuration: processes, data, model, optimizer and everything around them."""

import logging
import time
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state

from conf.schema import RunConfig
from data_pipeline.images.decode import ImageDecoder
from data_pipeline.loader import BatchLoader
from data_pipeline.noise import NoiseSource
from model.attention.context import find_context_shard
from model.attention.plan import PlanBuilder
from model.megatron.build import build_model_chunks, count_parameters
from model.megatron.transformer_config import TORCH_DTYPES
from pretrain.checkpointing.checkpointer import Checkpointer
from pretrain.health.compilations import CompilationCounter
from pretrain.health.guard import LossGuard
from pretrain.health.heartbeat import Heartbeat, Stragglers, Watchdog
from pretrain.reporting.run_report import RunReport
from pretrain.resume.data_change import with_order
from pretrain.resume.start_point import StartPoint, agree_on_start, build_manifest, load_initial_weights
from pretrain.run.kernel_cache import open_kernel_cache
from pretrain.run.model_parallel import model_parallel_groups
from pretrain.run.process_group import run_on_first_rank
from pretrain.run.run_data import HELDOUT_SEED, RunData, copy_tokenizer, count_samples, open_data
from pretrain.run.session import RunSession
from pretrain.run.start_record import record_start
from pretrain.run.terminal import start_console_logging
from pretrain.step.balance import StepBalance
from pretrain.step.evaluation import HeldoutEvaluation
from pretrain.step.images import ImageBuilder
from pretrain.step.microbatches import MicrobatchBuilder
from pretrain.step.optimizer import build_optimizer, wrap_data_parallel
from pretrain.step.parts import freeze_parts
from pretrain.step.userbuffers import userbuffers
from pretrain.trainer import Trainer

logger = logging.getLogger(__name__)


def run_training(config: RunConfig) -> int:
    """Train (or continue) the run that `config` describes, and return the exit status of the process.

    0: complete. EXIT_STOPPED or EXIT_INTERRUPTED: a signal came, everything is saved.
    Raises: UserError for what the user must change.
    """
    start_console_logging()
    data = open_data(config)
    groups = model_parallel_groups(config.parallel, config.runtime.timeout_minutes, config.train.seed)
    with RunSession(Path(config.run.dir), config.runtime) as session, groups, userbuffers(config):
        start = agree_on_start(config, data)
        data = with_order(data, start.order)
        trainer = build_trainer(config, data, start, session)
        if not trainer.is_finished:
            trainer.report.write_data(data, trainer.state)
        return trainer.run()


def build_trainer(config: RunConfig, data: RunData, start: StartPoint, session: RunSession) -> Trainer:
    """Build a trainer that continues at `start`, with weights (and optimizer state, when resuming) loaded."""
    session.record_config(config, start.state.step)
    run_on_first_rank(lambda: _record_start(config, data, start, session))
    device = session.ranks.device
    chunks = build_model_chunks(config.model, config.parallel, config.precision, config.runtime.loss_chunk_rows)
    chunks = [chunk.to(device) for chunk in chunks]
    if start.step_dir is None:
        load_initial_weights(config, start, chunks)
    freeze_parts(chunks, config.stage.freeze)
    heartbeat = Heartbeat(device)
    model = wrap_data_parallel(chunks, config.parallel, heartbeat.gradients_ready)
    optimizer = build_optimizer(model, config.optimizer, config.parallel, config.precision)
    manifest = partial(build_manifest, config, data, start)
    checkpointer = Checkpointer(session.run_dir, model, optimizer, config.checkpoint, manifest)
    session.open_metrics(start.state.step, config, wandb_project=config.runtime.wandb_project)
    kernel_cache = open_kernel_cache(config.runtime.compile_cache, session.ranks)
    kernels = CompilationCounter(kernel_cache, start.state.step)
    report = RunReport(config, session, Stragglers(config.runtime.straggler_factor), kernels)
    report.write_start(start, count_parameters(chunks))
    if start.step_dir is not None:
        _restore(checkpointer, report, start)
    guard = LossGuard(config.guard)
    guard.restore(start.guard)
    plans = build_plans(config, device)
    return Trainer(
        config=config,
        model=model,
        optimizer=optimizer,
        state=start.state,
        loader=_build_loader(config, data, start, build_image_decoder(config)),
        builder=build_microbatch_builder(config, data.tokenizer.mask_token_id, plans, "train"),
        evaluation=_build_evaluation(config, data, plans),
        checkpointer=checkpointer,
        guard=guard,
        heartbeat=heartbeat,
        watchdog=Watchdog(session.run_dir, session.ranks.rank, config.runtime.stall_timeout_minutes),
        report=report,
    )


def _record_start(config: RunConfig, data: RunData, start: StartPoint, session: RunSession) -> None:
    record_start(config, session.run_dir, session.ranks.world_size, start.list_changes())
    copy_tokenizer(config, data)


def _restore(checkpointer: Checkpointer, report: RunReport, start: StartPoint) -> None:
    began = time.perf_counter()
    assert start.step_dir is not None
    checkpointer.load(start.step_dir)
    report.write_restored(start.state, time.perf_counter() - began, start.verify_seconds)


def build_plans(config: RunConfig, device: torch.device) -> PlanBuilder:
    """Return what turns the layouts of this rank's sequences into attention and rotation on its device."""
    return PlanBuilder(
        config.model,
        config.runtime.attention_backend,
        TORCH_DTYPES[config.precision.dtype],
        device,
        find_context_shard(config.stage.block_size),
    )


def build_image_builder(config: RunConfig) -> ImageBuilder | None:
    """Return what deals the images of microbatches to ranks; None for a model of text alone."""
    vision = config.model.vision
    return None if vision is None else ImageBuilder(vision, config.parallel.sequence_parallel)


def build_image_decoder(config: RunConfig) -> ImageDecoder | None:
    """Return what decodes the images of this rank; None for a model of text alone."""
    images = build_image_builder(config)
    if images is None:
        return None
    from model.hf.image_processing_nemotron_labs_diffusion_vlm import encode_image  # seconds of transformers

    return ImageDecoder(encode_image, config.data.image_workers, images.choose)


def _build_loader(config: RunConfig, data: RunData, start: StartPoint, decode: ImageDecoder | None) -> BatchLoader:
    num_ranks = parallel_state.get_data_parallel_world_size()
    return BatchLoader(
        data.train,
        config.train.global_batch_size,
        config.train.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        num_ranks,
        config.data.prefetch_steps,
        count_samples(config, start.state),
        decode,
        StepBalance(config, data.train, build_noise(config, "train"), num_ranks),
    )


def build_noise(config: RunConfig, split: str) -> NoiseSource:
    """Return the noise of a split, train or heldout."""
    seed = HELDOUT_SEED if split == "heldout" else config.train.seed
    return NoiseSource(seed, config.stage.name, split, config.stage.noise_epsilon)


def build_microbatch_builder(
    config: RunConfig, mask_token_id: int, plans: PlanBuilder, split: str
) -> MicrobatchBuilder:
    """Return what turns batches into inputs of this stage's forwards; split: train or heldout, each with its noise."""
    if split == "train" and config.noisy_lengths:
        logger.info("noisy positions of a sequence in a forward: %s", ", ".join(map(str, config.noisy_lengths)))
    noise, images = build_noise(config, split), build_image_builder(config)
    return MicrobatchBuilder(config.stage, noise, mask_token_id, plans, config.noisy_lengths, images)


def _build_evaluation(config: RunConfig, data: RunData, plans: PlanBuilder) -> HeldoutEvaluation | None:
    if data.heldout is None:
        return None
    builder = build_microbatch_builder(config, data.tokenizer.mask_token_id, plans, "heldout")
    num_sequences = min(config.evaluation.sequences, data.heldout.num_samples_without_repeats)
    decode = build_image_decoder(config)
    return HeldoutEvaluation(data.heldout, builder, num_sequences, config.train.micro_batch_size, decode)
