"""Starting the training of a draft adapter: everything it needs, its newest checkpoint loaded."""

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from conf.schema import ResumeMode
from conf.schema.drafter import DrafterConfig, ResponseSource
from conf.system.errors import UserError
from lora.drafter.adapter import attach_new_adapter, count_adapter_parameters
from lora.drafter.adapter_folder import check_output, draw_run_id
from lora.drafter.batches import DraftBatches
from lora.drafter.checkpoint_manifest import FixedSettings, check_version, read_state
from lora.drafter.checks import check_lengths, check_rank
from lora.drafter.console import DrafterConsole
from lora.drafter.engine import EngineCheckpoints, build_engine
from lora.drafter.step import DraftStep
from lora.drafter.trainer import DrafterTrainer
from lora.examples.run_examples import RunExamples, add_responses, open_run_examples
from model.checkpoint.layout import find_newest_complete
from model.export.draft_adapter import identify_checkpoint
from model.export.load import check_export, check_vocabulary, load_export, load_export_tokenizer
from pretrain.run.integrity import find_intact_checkpoint
from pretrain.run.metrics import MetricsWriter
from pretrain.run.process_group import choose_device, run_on_first_rank, start_process_group
from pretrain.run.reporters import open_reporters
from pretrain.run.run_folder import lock_run_folder, record_run
from pretrain.run.run_status import TrainState
from pretrain.run.terminal import start_console_logging, start_logging

SHARDS_WEIGHTS = 3  # the ZeRO stage that does


def run_drafter(config: DrafterConfig) -> int:
    """Trains (or continues) the draft adapter that `config` describes; returns the exit status of the process.

    0, or that of a signal after which everything is saved (pretrain/run/stop.py). Raises UserError for what the user
    can mend.
    """
    start_console_logging()
    check_export(Path(config.checkpoint))
    check_output(config)
    device = choose_device(config.runtime.device)
    owns_process_group = not dist.is_initialized()
    if owns_process_group:
        start_process_group(device, config.runtime.timeout_minutes)
    run_dir = Path(config.run.dir)
    with lock_run_folder(run_dir) if dist.get_rank() == 0 else nullcontext():
        run_on_first_rank(lambda: draw_run_id(run_dir))
        status = build_drafter_trainer(config, device).run()
    # Not after an error: taking the group down waits for peers that may be inside a collective.
    if owns_process_group:
        dist.destroy_process_group()
    return status


def build_drafter_trainer(config: DrafterConfig, device: torch.device) -> DrafterTrainer:
    """Everything a run needs, its newest checkpoint loaded. All ranks together."""
    is_first, run_dir = dist.get_rank() == 0, Path(config.run.dir)
    console = DrafterConsole(config, is_first)
    newest = open_folder(config, console, is_first)
    data = open_run_examples(config)
    checkpoint = Path(config.checkpoint)
    identity = identify_checkpoint(checkpoint)
    model = load_export(checkpoint, dtype=config.runtime.dtype.value, device=choose_place(config, device))
    block_size = config.block_size or model.config.block_size
    check_lengths(config, block_size, model.config.max_position_embeddings)
    check_rank(config, model.config)
    check_vocabulary(checkpoint, load_export_tokenizer(checkpoint), model.config.vocab_size)
    with console.responses():
        data = add_responses(config, data, model, identity, console.count_responses)
    adapted = attach_new_adapter(model, config.adapter, config.train.seed)
    if config.runtime.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    step = DraftStep(adapted, config.objective, model.config.mask_token_id, config.runtime.loss_chunk_blocks)
    engine = build_engine(step, config, device)
    facts = FixedSettings(
        checkpoint=identity,
        data=data.fingerprint,
        rank=config.adapter.rank,
        alpha=config.adapter.alpha,
        block_size=block_size,
        seed=config.train.seed,
        num_ranks=dist.get_world_size(),
        zero_stage=config.zero.stage,
    )
    checkpoints = EngineCheckpoints(run_dir, engine, config.checkpointing.keep)
    state = read_state(newest, facts) if newest else TrainState()
    if newest:
        checkpoints.load(newest)
    if is_first:
        record_run(config, run_dir, state.step)
    origin = f"resuming {newest}" if newest else f"a new adapter for {config.checkpoint}"
    console.say_start(data, count_adapter_parameters(model.config, config.adapter.rank), origin)
    return DrafterTrainer(
        config=config,
        facts=facts,
        engine=engine,
        state=state,
        batches=_build_batches(config, data, block_size, is_heldout=False),
        heldout=_build_batches(config, data, block_size, is_heldout=True),
        checkpoints=checkpoints,
        metrics=_open_metrics(config, state.step) if is_first else None,
        console=console,
        device=device,
    )


def _open_metrics(config: DrafterConfig, step: int) -> MetricsWriter:
    run_dir = Path(config.run.dir)
    return MetricsWriter(run_dir, step, open_reporters(run_dir, step, tensorboard=config.runtime.tensorboard))


def choose_place(config: DrafterConfig, device: torch.device) -> str:
    """Where the model is loaded: ZeRO-3 takes it apart from the CPU, so that it need not fit on one device; to answer
    prompts it must."""
    is_given = config.responses.source is ResponseSource.given
    return "cpu" if config.zero.stage == SHARDS_WEIGHTS and is_given else str(device)


def open_folder(config: DrafterConfig, console: DrafterConsole, is_first: bool) -> Path | None:
    """The newest checkpoint of the run folder, if any; logs go there. Raises: UserError if one is not wanted."""
    run_dir = Path(config.run.dir)
    start_logging(run_dir, console.rich, is_first)
    if config.resume is ResumeMode.never and find_newest_complete(run_dir):
        raise UserError(f"{run_dir} holds a run already: choose another run.name, or continue it with resume=auto")
    return find_intact_checkpoint(run_dir, check_version)


def _build_batches(config: DrafterConfig, data: RunExamples, block_size: int, *, is_heldout: bool) -> DraftBatches:
    return DraftBatches(
        data.heldout if is_heldout else data.train,
        seed=config.train.seed,
        blocks=config.train.blocks_per_sequence,
        block_size=block_size,
        micro_batch_size=config.train.micro_batch_size,
        is_heldout=is_heldout,
    )
