"""Decides where a run begins: its own newest checkpoint, the weights of `init_from`, or fresh weights."""

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from conf.composition.renamed import RUN_RENAMES
from conf.schema import Objective, ResumeMode, RunConfig
from conf.system.errors import UserError
from data_pipeline.order import BlendOrder
from model.checkpoint.layout import (
    CheckpointManifest,
    check_same_model,
    find_newest_complete,
    load_checkpoint_manifest,
    model_config_from,
    resolve_checkpoint,
)
from model.convert.checkpoint_info import is_hf_directory, read_checkpoint_info
from model.convert.dist_reader import DistReader
from model.convert.load_weights import load_hf_weights, load_megatron_weights
from model.convert.mapping import build_tensor_table
from model.megatron.initialise import initialise_weights
from model.megatron.transformer_config import TORCH_DTYPES
from pretrain.resume.config_changes import ConfigChange, compare_configs, describe_changes, describe_learning_rate
from pretrain.resume.data_change import DataChange, compare_data
from pretrain.run.integrity import find_damage_over_ranks, find_intact_checkpoint
from pretrain.run.process_group import decide_on_first_rank
from pretrain.run.run_data import RunData
from pretrain.run.run_folder import METRICS_FILE, plain
from pretrain.run.run_status import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartPoint:
    """Holds where a run begins; the same on every rank.

    step_dir: checkpoint to resume, or None. weights: HF directory or step directory to take weights from, or None.
    guard: what the loss guard remembers. eos_token_id, export: values an export gives back, handed from checkpoint to
    checkpoint.
    order: of the training samples from here on; None: as opened, from sample 0.
    changes: settings that are others than the checkpoint's. remarks: what they do to learning rate and data.
    verify_seconds: it took to choose, of which comparing checksums is nearly all. set_aside: on rank 0, one
    sentence per damaged checkpoint.
    """

    eos_token_id: int
    state: TrainState = field(default_factory=TrainState)
    step_dir: Path | None = None
    weights: Path | None = None
    guard: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    order: BlendOrder | None = None
    changes: tuple[ConfigChange, ...] = ()
    remarks: tuple[str, ...] = ()
    verify_seconds: float = 0.0
    set_aside: tuple[str, ...] = ()

    def describe_changes(self) -> Iterator[str]:
        """Yield few lines for the log on what changes from here on; none where everything is as before."""
        yield from describe_changes(self.changes, self.state.step)
        yield from self.remarks

    def list_changes(self) -> Iterator[str]:
        """Yield the same for a file: one line per setting."""
        yield from map(str, self.changes)
        yield from self.remarks


def agree_on_start(config: RunConfig, data: RunData) -> StartPoint:
    """Return where all ranks begin. Rank 0 decides: another one may look while a checkpoint is appearing.

    Every file that will be read is compared with its checksum first. A damaged checkpoint of the run is set aside and
    the one before is taken. Raises UserError on every rank where the checkpoint and the run do not fit.
    """
    began = time.perf_counter()
    set_aside: list[str] = []

    def say(message: str) -> None:
        logger.warning(message)  # at once, should none be left
        set_aside.append(message)

    if config.resume.mode is ResumeMode.auto:
        find_intact_checkpoint(Path(config.run.dir), load_checkpoint_manifest, say)
    start = decide_on_first_rank(lambda: find_start(config, data))
    if (
        start.weights is not None
        and not is_hf_directory(start.weights)
        and (damage := find_damage_over_ranks(start.weights))
    ):
        raise UserError(f"init_from={start.weights} is damaged: {damage}. Use another step, or a copy of this one.")
    return replace(start, verify_seconds=time.perf_counter() - began, set_aside=tuple(set_aside))


def find_start(config: RunConfig, data: RunData) -> StartPoint:
    """Decide as one process; reads no weights. Raises: UserError where the checkpoint and the run do not fit."""
    newest = find_newest_complete(config.run.dir)
    if config.resume.mode is ResumeMode.never and (newest or (Path(config.run.dir) / METRICS_FILE).exists()):
        raise UserError(
            f"{config.run.dir} already holds a run and resume=never: choose another run.name, or resume=auto to "
            "continue it."
        )
    if newest is not None:
        return _resume(config, data, newest)
    if config.init_from is not None:
        return _start_from_weights(config, data, config.init_from)
    return StartPoint(_end_of_response(data, data.tokenizer.eos_token_id))


def _resume(config: RunConfig, data: RunData, step_dir: Path) -> StartPoint:
    manifest = load_checkpoint_manifest(step_dir)
    check_resumable(config, data, manifest, step_dir)
    change = compare_data(data, manifest, step_dir)
    change.check(config.resume.allow_data_change)
    DistReader(step_dir).check(build_tensor_table(config.model))
    state = TrainState(manifest.step, manifest.tokens_seen, manifest.samples_seen)
    then, now = RUN_RENAMES.read_old(manifest.config), plain(config)
    return StartPoint(
        manifest.eos_token_id,
        state,
        step_dir=step_dir,
        guard=_keep_guard(change),
        export=manifest.export,
        order=change.order,
        changes=compare_configs(then, now),
        remarks=(*describe_learning_rate(then, now, state.tokens_seen), *change.describe()),
    )


def _keep_guard(change: DataChange) -> dict[str, Any]:
    """Return what the guard remembers; of another blend it knows no losses yet."""
    guard = change.manifest.guard
    return guard if change.is_same_blend else {**guard, "losses": []}


def _start_from_weights(config: RunConfig, data: RunData, init_from: str) -> StartPoint:
    weights = Path(init_from) if is_hf_directory(init_from) else resolve_checkpoint(init_from)
    info = read_checkpoint_info(weights, config.data.mask_token)
    check_same_model(info.model, config.model, str(weights))
    _check_same_tokenizer(info.tokenizer, config, data, weights)
    return StartPoint(_end_of_response(data, info.eos_token_id), weights=weights, export=info.export)


def _end_of_response(data: RunData, eos_token_id: int | None) -> int:
    """Return the end-of-sequence token an export declares: the end of a turn after chats, else what it was before."""
    if data.chat is not None:
        return data.chat.end_of_turn_id
    assert eos_token_id is not None, "open_data checks it"
    return eos_token_id


def check_resumable(config: RunConfig, data: RunData, manifest: CheckpointManifest, step_dir: Path) -> None:
    """Refuse another model or tokenizer; layout and settings of a run may change."""
    check_same_model(model_config_from(manifest.model, str(step_dir)), config.model, str(step_dir))
    if manifest.stage != config.stage.name:
        raise UserError(
            f"{step_dir} was written by stage {manifest.stage}, this run is stage {config.stage.name}: choose another "
            "run.name and give the earlier run as init_from."
        )
    _check_same_parts(manifest, config, step_dir)
    _check_same_tokenizer(manifest.tokenizer, config, data, step_dir)


def _check_same_parts(manifest: CheckpointManifest, config: RunConfig, step_dir: Path) -> None:
    """Refuse to train other parts of the model: the optimizer has no state for those that were frozen."""
    before, frozen = (set(stage.get("freeze", [])) for stage in (manifest.config.get("stage", {}), plain(config.stage)))
    if before != frozen:
        then, now = (", ".join(sorted(names)) or "nothing" for names in (before, frozen))
        raise UserError(
            f"{step_dir} was trained with stage.freeze naming {then}, now it names {now}: go on as before, or choose "
            "another run.name and give this run as init_from."
        )


def _check_same_tokenizer(theirs: dict[str, Any], config: RunConfig, data: RunData, where: Path) -> None:
    """Refuse another tokenizer. theirs: what a manifest or a Hugging Face directory names."""
    if theirs["fingerprint"] != data.tokenizer.fingerprint:
        raise UserError(
            f"{where} was trained with tokenizer {theirs['fingerprint'][:12]}, data.tokenizer "
            f"{config.data.tokenizer} is {data.tokenizer.fingerprint[:12]}: use the same tokenizer."
        )
    if theirs["mask_token_id"] != data.tokenizer.mask_token_id:
        raise UserError(
            f"{where} was trained with mask token {theirs['mask_token_id']}, data.mask_token={config.data.mask_token} "
            f"is token {data.tokenizer.mask_token_id}: use the same mask token."
        )


def load_initial_weights(config: RunConfig, start: StartPoint, chunks: list[Any]) -> None:
    """Fill a live model that does not resume: from start.weights, or with fresh weights."""
    if start.weights is None:
        initialise_weights(chunks, config.model, config.train.seed)
    elif is_hf_directory(start.weights):
        load_hf_weights(chunks, start.weights, config.model)
    else:
        load_megatron_weights(chunks, start.weights, config.model)


def build_manifest(
    config: RunConfig, data: RunData, start: StartPoint, state: TrainState, guard: dict[str, Any]
) -> CheckpointManifest:
    """Build what the checkpoint of this moment says about itself."""
    export = dict(start.export)
    if config.stage.objective is Objective.joint:
        export["dlm_loss_weight"] = config.stage.diffusion_weight
    return CheckpointManifest(
        step=state.step,
        tokens_seen=state.tokens_seen,
        samples_seen=state.samples_seen,
        stage=config.stage.name,
        block_size=config.stage.block_size,
        model=asdict(config.model),
        tokenizer={
            "fingerprint": data.tokenizer.fingerprint,
            "mask_token_id": data.tokenizer.mask_token_id,
            "vocab_size": data.tokenizer.vocab_size,
        },
        eos_token_id=start.eos_token_id,
        dtype=str(TORCH_DTYPES[config.precision.dtype]).removeprefix("torch."),
        data=data.train.fingerprint(),
        data_position=data.train.order.to_dict(),
        config=plain(config),
        guard=guard,
        export=export,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "megatron-core", "transformers")}
