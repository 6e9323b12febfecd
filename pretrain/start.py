"""Where a run begins: its own newest checkpoint, the weights of `init_from`, or fresh weights."""

import logging
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.schema import Objective, ResumeMode, RunConfig
from model.checkpoint_layout import (
    CheckpointManifest,
    check_same_model,
    find_newest_complete,
    load_manifest,
    model_config_from,
    resolve_checkpoint,
)
from model.convert.facts import is_hf_directory, read_export_values
from model.convert.load_weights import load_hf_weights, load_megatron_weights
from model.initialise import initialise_weights
from model.transformer_config import TORCH_DTYPES
from pretrain.data import RunData
from pretrain.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartPoint:
    """step_dir: checkpoint to resume, or None. export: values an export gives back, handed from run to run."""

    state: TrainState = field(default_factory=TrainState)
    step_dir: Path | None = None
    export: dict[str, Any] = field(default_factory=dict)


def find_start(config: RunConfig, data: RunData) -> StartPoint:
    """Decides before anything is built. Raises UserError where the checkpoint and the run do not fit."""
    newest = find_newest_complete(config.run.dir)
    if newest is None:
        return StartPoint(export=read_export_values(config.init_from) if config.init_from else {})
    if config.resume.mode is ResumeMode.never:
        raise UserError(
            f"{config.run.dir} already holds a run ({newest.name}) and resume=never: choose another run.name, or "
            "resume=auto to continue it."
        )
    manifest = load_manifest(newest)
    check_resumable(config, data, manifest, newest)
    state = TrainState(manifest.step, manifest.tokens_seen, manifest.samples_seen)
    return StartPoint(state, newest, manifest.export)


def check_resumable(config: RunConfig, data: RunData, manifest: CheckpointManifest, step_dir: Path) -> None:
    """A run may change its layout and its settings, not its model, tokenizer or (unasked) its data."""
    check_same_model(model_config_from(manifest.model, str(step_dir)), config.model, str(step_dir))
    if manifest.stage != config.stage.name:
        raise UserError(
            f"{step_dir} was written by stage {manifest.stage}, this run is stage {config.stage.name}: choose another "
            "run.name and give the earlier run as init_from."
        )
    if manifest.tokenizer["fingerprint"] != data.tokenizer.fingerprint:
        raise UserError(
            f"{step_dir} was trained with tokenizer {manifest.tokenizer['fingerprint'][:12]}, data.tokenizer "
            f"{config.data.tokenizer} is {data.tokenizer.fingerprint[:12]}: use the same tokenizer."
        )
    now = data_fingerprint(config, data)
    changed = sorted(key for key in now | manifest.data if now.get(key) != manifest.data.get(key))
    if changed and not config.resume.allow_data_change:
        listing = "; ".join(f"{key}: {manifest.data.get(key)} then, {now.get(key)} now" for key in changed)
        raise UserError(
            f"{step_dir} was trained on other data ({listing}). Give back the former data, or continue on the new "
            "data with resume.allow_data_change=true."
        )


def data_fingerprint(config: RunConfig, data: RunData) -> dict[str, Any]:
    """What decides which tokens a step sees: the data, the sequence length and the seed of the order."""
    return {
        **data.train.fingerprint(),
        "sequence_length": config.data.sequence_length,
        "seed": config.train.seed,
    }


def load_initial_weights(config: RunConfig, chunks: list[Any]) -> None:
    """Fills a live model that does not resume: from `init_from`, or with fresh weights."""
    if config.init_from is None:
        initialise_weights(chunks, config.model, config.train.seed)
        return
    if is_hf_directory(config.init_from):
        load_hf_weights(chunks, config.init_from, config.model)
    else:
        load_megatron_weights(chunks, resolve_checkpoint(config.init_from), config.model)


def build_manifest(config: RunConfig, data: RunData, state: TrainState, export: dict[str, Any]) -> CheckpointManifest:
    """What the checkpoint of this moment says about itself."""
    assert data.tokenizer.eos_token_id is not None, "open_data checks it"
    if config.stage.objective is Objective.joint:
        export = {**export, "dlm_loss_weight": config.stage.diffusion_weight}
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
        eos_token_id=data.tokenizer.eos_token_id,
        dtype=str(TORCH_DTYPES[config.precision.dtype]).removeprefix("torch."),
        data=data_fingerprint(config, data),
        export=export,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "megatron-core", "transformers")}
