"""The start of a drafter's run: model, data, engine and checkpoint, checked against each other."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from conf.schema import ResumeMode
from conf.schema.drafter import DrafterConfig, ResponseSource
from conf.system.errors import UserError
from lora.drafter.adapter import count_adapter_parameters
from lora.drafter.adapter_folder import check_output, draw_run_id
from lora.drafter.batches import DraftBatches
from lora.drafter.checkpoint_manifest import FixedSettings, check_version, read_state
from lora.drafter.engine import EngineFiles, build_engine
from lora.drafter.step import build_step
from lora.drafter.trainer import DrafterTrainer
from lora.examples.run_examples import OpenedExamples, RunExamples, add_responses, open_run_examples
from model.checkpoint.layout import find_newest_complete
from model.export.draft_adapter import identify_checkpoint
from model.export.load import check_export, check_vocabulary, load_export, load_export_tokenizer
from pretrain.run.process_group import run_on_first_rank
from pretrain.run.run_status import TrainState
from pretrain.run.session import RunSession
from pretrain.run.terminal import start_console_logging

SHARDS_WEIGHTS = 3  # the ZeRO level that does
logger = logging.getLogger(__name__)


def run_drafter(config: DrafterConfig) -> int:
    """Train (or continue) the draft adapter that `config` describes and return the exit status of the process.

    0, or that of a signal after which everything is saved (pretrain/run/stop.py).

    Raises: UserError for what the user can fix.
    """
    start_console_logging()
    check_export(Path(config.checkpoint))
    check_output(config)
    with RunSession(Path(config.run.dir), config.runtime) as session:
        run_on_first_rank(lambda: draw_run_id(session.run_dir))
        return build_drafter_trainer(config, session).run()


def build_drafter_trainer(config: DrafterConfig, session: RunSession) -> DrafterTrainer:
    """Build everything a run needs and load its newest checkpoint; all ranks together."""
    newest = _find_checkpoint(config, session)
    opened = open_run_examples(config)
    refuse_sharded_tower(config, opened)
    checkpoint, device = Path(config.checkpoint), session.ranks.device
    identity = identify_checkpoint(checkpoint)
    model = load_export(checkpoint, dtype=config.runtime.dtype.value, device=_choose_model_device(config, device))
    block_size = config.block_size or model.config.block_size
    check_lengths(config, block_size, model.config.max_position_embeddings)
    check_rank(config, model.config)
    check_vocabulary(checkpoint, load_export_tokenizer(checkpoint), model.config.vocab_size)
    examples = _add_responses(config, opened, model, identity, session)
    engine = build_engine(build_step(model, config), config, device)
    fixed = FixedSettings(
        checkpoint=identity,
        data=examples.fingerprint,
        rank=config.adapter.rank,
        alpha=config.adapter.alpha,
        block_size=block_size,
        seed=config.train.seed,
        num_ranks=session.ranks.world_size,
        zero_stage=config.zero.stage,
    )
    files = EngineFiles(engine)
    state = read_state(newest, fixed) if newest else TrainState()
    if newest:
        files.load(newest)
    session.record_config(config, state.step)
    session.open_metrics(state.step, config)
    origin = f"resuming {newest}" if newest else f"a new adapter for {config.checkpoint}"
    _log_start(config, examples, count_adapter_parameters(model.config, config.adapter.rank), origin)
    return DrafterTrainer(
        config=config,
        session=session,
        fixed=fixed,
        engine=engine,
        files=files,
        state=state,
        batches=_build_batches(config, examples, block_size, is_heldout=False),
        heldout=_build_batches(config, examples, block_size, is_heldout=True),
        bar=session.progress_bar("drafter"),
    )


def refuse_sharded_tower(config: DrafterConfig, opened: OpenedExamples) -> None:
    """Raise UserError for prompts with images under ZeRO-3: only ranks with images would gather the tower's weights."""
    if config.zero.stage == SHARDS_WEIGHTS and (opened.train.has_images or opened.heldout.has_images):
        raise UserError(
            f"zero.stage={SHARDS_WEIGHTS} shards weights, which a vision tower needs whole, and the prompts have "
            "images: set zero.stage to 2 or less"
        )


def check_lengths(config: DrafterConfig, block_size: int, max_positions: int) -> None:
    """Raise UserError if sequences do not fit the model, or blocks do not fit the sequences."""
    length = config.train.sequence_length
    if length + block_size > max_positions:
        raise UserError(
            f"train.sequence_length={length} and a drafted block of {block_size} exceed the {max_positions} positions "
            f"of {config.checkpoint}: give train.sequence_length={max_positions - block_size} or less"
        )
    if not 1 < block_size < length:
        raise UserError(
            f"a block of {block_size} tokens (block_size, by default the checkpoint's) does not fit sequences of "
            f"train.sequence_length={length}: give a block_size between 2 and {length - 1}, or longer sequences"
        )


def check_rank(config: DrafterConfig, model: Any) -> None:
    """Raise UserError if the adapter would have more rank than o_proj. model: the checkpoint's configuration."""
    largest = min(model.hidden_size, model.num_attention_heads * model.head_dim)
    if config.adapter.rank > largest:
        raise UserError(
            f"adapter.rank={config.adapter.rank} is above the rank of o_proj itself: give at most {largest} for "
            f"{config.checkpoint}"
        )


def _find_checkpoint(config: DrafterConfig, session: RunSession) -> Path | None:
    """Return the run's newest checkpoint, if any. Raises: UserError if there is one and it is not wanted."""
    run_on_first_rank(lambda: _refuse_used_folder(config))
    return session.find_checkpoint(check_version)


def _refuse_used_folder(config: DrafterConfig) -> None:
    run_dir = Path(config.run.dir)
    if config.resume is ResumeMode.never and find_newest_complete(run_dir):
        raise UserError(f"{run_dir} holds a run already: choose another run.name, or continue it with resume=auto")


def _choose_model_device(config: DrafterConfig, device: torch.device) -> str:
    """Return where the model is loaded.

    ZeRO-3 shards it from the CPU, so that it need not fit on one device. To respond to prompts it must fit.
    """
    is_given = config.responses.source is ResponseSource.given
    return "cpu" if config.zero.stage == SHARDS_WEIGHTS and is_given else str(device)


def _add_responses(
    config: DrafterConfig, opened: OpenedExamples, model: Any, identity: str, session: RunSession
) -> RunExamples:
    """Call add_responses with a bar over the prompts that this rank responds to."""
    bar = session.progress_bar("responses")
    responds = config.responses.source is not ResponseSource.given
    with bar.show(1, 0) if responds else nullcontext():
        return add_responses(
            config,
            opened,
            model,
            identity,
            lambda done, total: bar.update(done, f"{done} of {total} prompts", total),
        )


def _log_start(config: DrafterConfig, examples: RunExamples, num_parameters: int, origin: str) -> None:
    train = config.train
    logger.info(
        f"{config.run.dir}: {train.steps} steps of {train.global_batch_size} sequences with up to "
        f"{train.blocks_per_sequence} drafted blocks each; {num_parameters / 1e6:.2f}M trainable parameters; "
        f"{len(examples.train)} sequences to train on, {len(examples.heldout)} held out; {origin}"
    )


def _build_batches(config: DrafterConfig, examples: RunExamples, block_size: int, *, is_heldout: bool) -> DraftBatches:
    return DraftBatches(
        examples.heldout if is_heldout else examples.train,
        seed=config.train.seed,
        blocks=config.train.blocks_per_sequence,
        block_size=block_size,
        micro_batch_size=config.train.micro_batch_size,
        is_heldout=is_heldout,
    )
