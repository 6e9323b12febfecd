"""The run's datasets and tokenizer, opened and checked against each other and against the model."""

from dataclasses import dataclass
from pathlib import Path

from conf.atomic import atomic_directory
from conf.errors import UserError
from conf.schema import RunConfig
from conf.tokenizer_info import TokenizerInfo, read_tokenizer_info
from data_pipeline.dataset import TokenDataset
from model.checkpoint_layout import tokenizer_directory
from model.convert.hf_target import copy_tokenizer as copy_tokenizer_files


@dataclass(frozen=True)
class RunData:
    """train, heldout: datasets (heldout may be missing). tokenizer: facts about the tokenizer that made them."""

    train: TokenDataset
    heldout: TokenDataset | None
    tokenizer: TokenizerInfo


def open_data(config: RunConfig) -> RunData:
    """Raises UserError for missing or empty data, a tokenizer without mask token, a vocabulary that does not fit."""
    tokenizer = read_tokenizer_info(config.data.tokenizer, config.data.mask_token)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {config.data.tokenizer} names no eos_token: set it in tokenizer_config.json."
        )
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer in {config.data.tokenizer} has {tokenizer.vocab_size} entries, the model has "
            f"model.vocab_size={config.model.vocab_size}: use the model's own tokenizer."
        )
    train = _open(config, config.data.train, tokenizer, shuffle=True)
    heldout = _open(config, config.data.heldout, tokenizer, shuffle=False) if config.data.heldout else None
    return RunData(train, heldout, tokenizer)


def _open(config: RunConfig, prefix: str, tokenizer: TokenizerInfo, shuffle: bool) -> TokenDataset:
    dataset = TokenDataset(
        prefix, config.data.sequence_length, config.stage.block_size, seed=config.train.seed, shuffle=shuffle
    )
    dataset.check_vocabulary(config.model.vocab_size)
    dataset.check_tokenizer(tokenizer.fingerprint)
    return dataset


def copy_tokenizer(config: RunConfig, fingerprint: str) -> None:
    """Keeps the tokenizer with the run, so that an export never depends on files elsewhere.

    A copy of another tokenizer is replaced: it is left from a run that stopped before its first checkpoint.
    """
    target = tokenizer_directory(config.run.dir)
    if target.exists() and read_tokenizer_info(target, config.data.mask_token).fingerprint == fingerprint:
        return
    with atomic_directory(target, replace=True) as partial:
        copy_tokenizer_files(Path(config.data.tokenizer), partial)
