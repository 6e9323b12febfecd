"""What a checkpoint states about itself, be it a Hugging Face directory, a run folder or a step directory.

The importer writes this into its manifest. A training run that starts from the checkpoint checks it and passes `export`
and `eos_token_id` on to the manifests of its own checkpoints. No weights are read.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.schema import DataConfig, ModelConfig, StageConfig
from conf.system.errors import UserError
from conf.tokenizer_info import TokenizerInfo, read_tokenizer_info
from model.checkpoint.layout import load_checkpoint_manifest, model_config_from, resolve_checkpoint
from model.convert.generation import list_stop_ids, select_decoding_defaults
from model.convert.hf_config import HfConfig, read_hf_config
from model.convert.image_vocabulary import check_image_vocabulary
from model.convert.nld_config import DECODING_DEFAULTS, select_preserved_values
from model.convert.processor_config import IMAGE_SETTINGS, read_image_settings
from model.export.shipped_code import CONFIG_NAME


@dataclass(frozen=True)
class CheckpointInfo:
    """The properties of a checkpoint that a conversion or a training run needs.

    Attributes:
        model: its dimensions.
        tokenizer: {fingerprint, mask_token_id, vocab_size}.
        eos_token_id: the declared end of a response.
        block_size: tokens per diffusion block (the default, for Ministral 3).
        export: keys of a Hugging Face config that nothing else decides and a later export restores.
    """

    model: ModelConfig
    tokenizer: dict[str, Any]
    eos_token_id: int
    block_size: int
    export: dict[str, Any] = field(default_factory=dict)


def is_hf_directory(path: Path | str) -> bool:
    """Return whether `path` looks like a Hugging Face checkpoint (else it must be a run folder or step directory)."""
    return (Path(path) / CONFIG_NAME).is_file()


def read_checkpoint_info(path: Path | str, mask_token: str = DataConfig.mask_token) -> CheckpointInfo:
    """Read the properties of any checkpoint.

    Args:
        path: Hugging Face directory, run folder or step directory.
        mask_token: text of the mask token, to be found in the tokenizer of a Hugging Face checkpoint.

    Raises:
        UserError: `path` is not a complete checkpoint of this family.
    """
    if is_hf_directory(path):
        return read_hf_checkpoint_info(Path(path), mask_token)
    step = resolve_checkpoint(path)
    manifest = load_checkpoint_manifest(step)
    model = model_config_from(manifest.model, str(step))
    return CheckpointInfo(model, manifest.tokenizer, manifest.eos_token_id, manifest.block_size, manifest.export)


def read_hf_checkpoint_info(directory: Path, mask_token: str) -> CheckpointInfo:
    """Read the properties of a Hugging Face directory from config.json and its tokenizer. Raises: UserError."""
    config = read_hf_config(directory)
    tokenizer = read_tokenizer_info(directory, mask_token)
    _check_tokenizer(directory, config, tokenizer, mask_token)
    if config.model.vision is not None:
        check_image_vocabulary(directory)
    stop_ids = list_stop_ids(directory, config.eos_token_id, config.model.vocab_size)
    eos_token_id = stop_ids[0] if stop_ids else tokenizer.eos_token_id
    if eos_token_id is None:
        raise UserError(
            f"neither generation_config.json, config.json nor the tokenizer in {directory} gives eos_token_id: add it"
        )
    return CheckpointInfo(
        model=config.model,
        tokenizer={
            "fingerprint": tokenizer.fingerprint,
            "mask_token_id": tokenizer.mask_token_id,
            "vocab_size": tokenizer.vocab_size,
        },
        eos_token_id=eos_token_id,
        block_size=config.values.get("block_size", StageConfig.block_size) if config.is_nld else StageConfig.block_size,
        export=_select_export_values(directory, config, stop_ids),
    )


def _check_tokenizer(directory: Path, config: HfConfig, tokenizer: TokenizerInfo, mask_token: str) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has ids up to {tokenizer.vocab_size - 1}, but the embedding only "
            f"{config.model.vocab_size} rows: it belongs to another model"
        )
    declared = config.values.get("mask_token_id") if config.is_nld else None
    if declared is not None and declared != tokenizer.mask_token_id:
        raise UserError(
            f"{directory}/config.json has mask_token_id {declared}, but {mask_token!r} is token "
            f"{tokenizer.mask_token_id}: give the text of token {declared} as the mask token"
        )


def _select_export_values(directory: Path, config: HfConfig, stop_ids: list[int]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if config.is_nld:
        values = select_preserved_values(config.values, config.model)
    elif config.bos_token_id is not None:
        values["bos_token_id"] = config.bos_token_id
    if len(stop_ids) > 1:  # a manifest names only one
        values["eos_token_id"] = stop_ids
    if defaults := select_decoding_defaults(directory):
        values[DECODING_DEFAULTS] = defaults
    vision = config.model.vision
    if vision is not None and (settings := read_image_settings(directory, vision)):
        values[IMAGE_SETTINGS] = settings
    return values
