"""Where a run begins: its own newest checkpoint, the weights of `init_from`, or fresh weights."""

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

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
from model.convert.dist_reader import DistReader
from model.convert.facts import is_hf_directory, read_facts
from model.convert.load_weights import load_hf_weights, load_megatron_weights
from model.convert.mapping import build_table
from model.initialise import initialise_weights
from model.transformer_config import TORCH_DTYPES
from pretrain.data import RunData
from pretrain.metrics import METRICS_FILE
from pretrain.state import TrainState


@dataclass(frozen=True)
class StartPoint:
    """Where a run begins; the same on every rank.

    step_dir: checkpoint to resume, or None. weights: HF directory or step directory to take weights from, or None.
    eos_token_id, export: values an export gives back, handed from checkpoint to checkpoint.
    """

    eos_token_id: int
    state: TrainState = field(default_factory=TrainState)
    step_dir: Path | None = None
    weights: Path | None = None
    export: dict[str, Any] = field(default_factory=dict)


def find_start(config: RunConfig, data: RunData) -> StartPoint:
    """Decides before anything is built. Raises UserError where the checkpoint and the run do not fit."""
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
    return StartPoint(_end_of_answer(data, data.tokenizer.eos_token_id))


def share_start(start: StartPoint) -> StartPoint:
    """Rank 0's decision, for every rank: another rank may have looked while a checkpoint was appearing."""
    shared = [start]
    dist.broadcast_object_list(shared)
    return shared[0]


def _resume(config: RunConfig, data: RunData, step_dir: Path) -> StartPoint:
    manifest = load_manifest(step_dir)
    check_resumable(config, data, manifest, step_dir)
    DistReader(step_dir).check(build_table(config.model))
    state = TrainState(manifest.step, manifest.tokens_seen, manifest.samples_seen)
    return StartPoint(manifest.eos_token_id, state, step_dir=step_dir, export=manifest.export)


def _start_from_weights(config: RunConfig, data: RunData, init_from: str) -> StartPoint:
    weights = Path(init_from) if is_hf_directory(init_from) else resolve_checkpoint(init_from)
    facts = read_facts(weights, config.data.mask_token)
    check_same_model(facts.model, config.model, str(weights))
    _check_same_tokenizer(facts.tokenizer, config, data, weights)
    return StartPoint(_end_of_answer(data, facts.eos_token_id), weights=weights, export=facts.export)


def _end_of_answer(data: RunData, eos_token_id: int | None) -> int:
    """What an export declares: the end of a turn after chats, else what it was before."""
    if data.chat is not None:
        return data.chat.end_of_turn_id
    assert eos_token_id is not None, "open_data checks it"
    return eos_token_id


def check_resumable(config: RunConfig, data: RunData, manifest: CheckpointManifest, step_dir: Path) -> None:
    """A run may change its layout and its settings, not its model, tokenizer or (unasked) its data."""
    check_same_model(model_config_from(manifest.model, str(step_dir)), config.model, str(step_dir))
    if manifest.stage != config.stage.name:
        raise UserError(
            f"{step_dir} was written by stage {manifest.stage}, this run is stage {config.stage.name}: choose another "
            "run.name and give the earlier run as init_from."
        )
    _check_same_tokenizer(manifest.tokenizer, config, data, step_dir)
    now = data_fingerprint(data)
    changed = sorted(key for key in now | manifest.data if now.get(key) != manifest.data.get(key))
    if changed and not config.resume.allow_data_change:
        listing = "; ".join(f"{key}: {manifest.data.get(key)} then, {now.get(key)} now" for key in changed)
        raise UserError(
            f"{step_dir} was trained on other data ({listing}). Give back the former data, or continue on the new "
            "data with resume.allow_data_change=true."
        )


def _check_same_tokenizer(theirs: dict[str, Any], config: RunConfig, data: RunData, where: Path) -> None:
    """theirs: the tokenizer a manifest or a Hugging Face directory names."""
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


def data_fingerprint(data: RunData) -> dict[str, Any]:
    """What decides which tokens a step sees: the sources, their shares, the form of a sequence, the seed."""
    return data.train.fingerprint()


def load_initial_weights(config: RunConfig, start: StartPoint, chunks: list[Any]) -> None:
    """Fills a live model that does not resume: from start.weights, or with fresh weights."""
    if start.weights is None:
        initialise_weights(chunks, config.model, config.train.seed)
    elif is_hf_directory(start.weights):
        load_hf_weights(chunks, start.weights, config.model)
    else:
        load_megatron_weights(chunks, start.weights, config.model)


def build_manifest(config: RunConfig, data: RunData, state: TrainState, start: StartPoint) -> CheckpointManifest:
    """What the checkpoint of this moment says about itself."""
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
        data=data_fingerprint(data),
        export=export,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "megatron-core", "transformers")}
