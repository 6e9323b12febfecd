"""What a checkpoint says about itself, whether it is a Hugging Face directory, a run folder or a step directory.

The importer writes these into its manifest; a training run that starts from the checkpoint checks them and carries
`export` and `eos_token_id` on into the manifests of its own checkpoints. No weights are read.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.schema import DataConfig, ModelConfig, StageConfig
from conf.system.errors import UserError
from conf.tokenizer_info import TokenizerInfo, read_tokenizer_info
from model.checkpoint.layout import load_manifest, model_config_from, resolve_checkpoint
from model.convert.hf_config import HfConfig, read_hf_config
from model.convert.nld_config import kept_values
from model.export.shipped_code import CONFIG_NAME


@dataclass(frozen=True)
class CheckpointFacts:
    """model: its dimensions. tokenizer: {fingerprint, mask_token_id, vocab_size}.

    eos_token_id: declared end of an answer. block_size: tokens per diffusion block (the default, for Ministral 3).
    export: keys of a Hugging Face config that nothing else decides and an export gives back.
    """

    model: ModelConfig
    tokenizer: dict[str, Any]
    eos_token_id: int
    block_size: int
    export: dict[str, Any] = field(default_factory=dict)


def is_hf_directory(path: Path | str) -> bool:
    """Whether `path` looks like a Hugging Face checkpoint (else it must be a run folder or a step directory)."""
    return (Path(path) / CONFIG_NAME).is_file()


def read_facts(path: Path | str, mask_token: str = DataConfig.mask_token) -> CheckpointFacts:
    """Facts of any checkpoint.

    mask_token: text of the mask token, looked up in the tokenizer beside a Hugging Face checkpoint.
    Raises: UserError if `path` is no complete checkpoint of this family.
    """
    if is_hf_directory(path):
        return read_hf_facts(Path(path), mask_token)
    step = resolve_checkpoint(path)
    manifest = load_manifest(step)
    model = model_config_from(manifest.model, str(step))
    return CheckpointFacts(model, manifest.tokenizer, manifest.eos_token_id, manifest.block_size, manifest.export)


def read_export_values(path: Path | str) -> dict[str, Any]:
    """CheckpointFacts.export alone: needs no tokenizer beside the checkpoint. Raises: as read_facts."""
    if is_hf_directory(path):
        return _kept_for_export(read_hf_config(path))
    return load_manifest(resolve_checkpoint(path)).export


def read_hf_facts(directory: Path, mask_token: str) -> CheckpointFacts:
    """Facts of a Hugging Face directory, from config.json and its tokenizer files. Raises: as read_facts."""
    config = read_hf_config(directory)
    tokenizer = read_tokenizer_info(directory, mask_token)
    _check_tokenizer(directory, config, tokenizer, mask_token)
    eos_token_id = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    if eos_token_id is None:
        raise UserError(f"neither config.json nor the tokenizer in {directory} gives eos_token_id: add it")
    return CheckpointFacts(
        model=config.model,
        tokenizer={
            "fingerprint": tokenizer.fingerprint,
            "mask_token_id": tokenizer.mask_token_id,
            "vocab_size": tokenizer.vocab_size,
        },
        eos_token_id=eos_token_id,
        block_size=config.values.get("block_size", StageConfig.block_size) if config.is_nld else StageConfig.block_size,
        export=_kept_for_export(config),
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


def _kept_for_export(config: HfConfig) -> dict[str, Any]:
    if config.is_nld:
        return kept_values(config.values, config.model)
    return {} if config.bos_token_id is None else {"bos_token_id": config.bos_token_id}
