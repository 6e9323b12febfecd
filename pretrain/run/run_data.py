"""Opens the run's data and tokenizer, and checks them against each other and against the model."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from conf.schema import Objective, RunConfig, SourceConfig
from conf.system.atomic import atomic_directory
from conf.system.errors import UserError
from conf.tokenizer_info import TokenizerInfo, read_tokenizer_info
from data_pipeline.dataset import Blend, TokenDataset, build_blend
from data_pipeline.packing.form import build_sequence_form
from data_pipeline.storage.tokens import StoredTokens
from model.checkpoint.layout import tokenizer_directory
from model.convert.hf_target import CHAT_TEMPLATE_NAME, copy_tokenizer_files, write_chat_format
from pretrain.run.run_status import TrainState

HELDOUT_SEED = 0


@dataclass(frozen=True)
class ChatFormat:
    """Says how chats were written. template: jinja source. end_of_turn_id: the token every response ends with."""

    template: str
    end_of_turn_id: int


@dataclass(frozen=True)
class RunData:
    """Holds the blends train and heldout (which may be missing), and what is known of their tokenizer.

    chat: how chats were written, where the stage trains on nothing else.
    """

    train: Blend
    heldout: Blend | None
    tokenizer: TokenizerInfo
    chat: ChatFormat | None = None


def open_tokenizer(config: RunConfig) -> TokenizerInfo:
    """Open the tokenizer. Raises: UserError if it lacks a special token or has more entries than the model."""
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
    return tokenizer


def open_data(config: RunConfig) -> RunData:
    """Open all data. Raises: UserError for missing or empty data, or a tokenizer that fits neither data nor model."""
    tokenizer = open_tokenizer(config)
    train = _open_blend(config, config.data.train, tokenizer, config.train.seed)
    # One order and one noise for all runs, so that runs with different seeds are evaluated on the same sequences.
    heldout = _open_blend(config, config.data.heldout, tokenizer, HELDOUT_SEED) if config.data.heldout else None
    chat = read_chat_format([train, *([heldout] if heldout else [])]) if config.stage.chats_only else None
    return RunData(train, heldout, tokenizer, chat)


def _open_blend(config: RunConfig, sources: dict[str, SourceConfig], tokenizer: TokenizerInfo, seed: int) -> Blend:
    has_noise = config.stage.objective is Objective.joint
    form = build_sequence_form(config.data, config.stage.block_size, has_noise)
    checks_files = os.environ.get("RANK", "0") == "0"  # millions of file system calls if every rank did
    datasets = {
        name: TokenDataset(source.path, form, seed, checks_files=checks_files) for name, source in sources.items()
    }
    for dataset in datasets.values():
        dataset.check_vocabulary(config.model.vocab_size, tokenizer.mask_token_id)
        dataset.check_tokenizer(tokenizer.fingerprint)
        if dataset.counts.images and config.model.vision is None:
            raise UserError(
                f"{dataset.stored.path} holds {dataset.counts.images} images, model={config.model.name} reads none: "
                "choose a model with a vision tower (model=..._vlm), or data without images."
            )
    return build_blend(datasets, sources, seed)


def count_samples(config: RunConfig, state: TrainState) -> int:
    """Return the global samples passed at the end of a run that goes on from `state`.

    More than the batches of its steps where data were skipped or an earlier part had larger batches.
    """
    budget = max(config.train.tokens, config.tokens_per_step)
    steps = max(0, int(budget - state.tokens_seen) // config.tokens_per_step)
    return state.samples_seen + steps * config.train.global_batch_size


def describe_blend(blend: Blend, num_samples: int) -> Iterator[str]:
    """Yield one line per source: what it gives to a run of `num_samples` samples, and what was left out of it."""
    for name, epochs in blend.epochs(num_samples).items():
        source, counts = blend.sources[name], blend.sources[name].counts
        size = counts.sequences * source.form.sequence_length
        line = (
            f"{name}: {counts.tokens} tokens of {counts.documents} documents in {counts.sequences} sequences "
            f"({counts.padding_tokens / size:.1%} padding, {counts.block_padding_tokens / size:.1%} block padding), "
            f"{blend.shares()[name]:.1%} of the run, {epochs:.3g} epochs"
        )
        if counts.truncated_chats or counts.dropped_chats:
            line += (
                f"; longer than a sequence: {counts.truncated_chats} chats truncated by {counts.truncated_tokens} "
                f"tokens, {counts.dropped_chats} dropped with {counts.dropped_tokens}"
            )
        if counts.images:
            share = counts.image_tokens / counts.tokens
            line += f"; {counts.images} images with {counts.image_tokens} tokens ({share:.1%} of all)"
        yield line


def describe_overlap(data: RunData) -> Iterator[str]:
    """Yield one line per held-out and training source that have documents in common."""
    heldout = data.heldout.sources.items() if data.heldout else ()
    for (name, source), (trained_name, trained) in product(heldout, data.train.sources.items()):
        if source.stored.sha256 == trained.stored.sha256 or _share_documents(source.stored, trained.stored):
            yield f"held-out source {name} has documents of the training source {trained_name}: they are not held out"


def _share_documents(heldout: StoredTokens, trained: StoredTokens) -> bool:
    """Return whether two datasets were made of the same files, and not of records that exclude each other."""
    if heldout.manifest is None or trained.manifest is None:
        return False
    files = [
        {item.get("sample_sha256", item["name"]) for item in dataset.source.get("inputs", [])}
        for dataset in (heldout.manifest, trained.manifest)
    ]
    manifests = (heldout.manifest, trained.manifest)
    kinds = {manifest.settings.get("rows") for manifest in manifests}
    rules = [[manifest.settings.get(key) for key in ("heldout_every", "selection")] for manifest in manifests]
    exclude = kinds == {"train", "heldout"} and rules[0] == rules[1]
    return bool(files[0] & files[1]) and not exclude


def read_chat_format(blends: list[Blend]) -> ChatFormat:
    """Return how chats were written. Raises: UserError for a source of texts, or for different templates."""
    formats: dict[ChatFormat, str] = {}
    for name, source in (item for blend in blends for item in blend.sources.items()):
        manifest = source.stored.manifest
        if manifest is None or not source.stored.kind.is_chat:
            raise UserError(
                f"the source {name} ({source.stored.path}) holds texts, and stage.chats_only=true trains on responses: "
                "prepare chats (data=chats, or input.kind: chat)."
            )
        chat = ChatFormat(manifest.settings["encoder"]["chat_template"], manifest.block_padding_token_id)
        formats.setdefault(chat, str(source.stored.path))
    if len(formats) > 1:
        names = " and ".join(list(formats.values())[:2])
        raise UserError(f"{names} were rendered by different chat templates: prepare them with the same one.")
    return next(iter(formats))


def copy_tokenizer(config: RunConfig, data: RunData) -> None:
    """Copy the tokenizer into the run folder, so that an export never depends on files elsewhere.

    After chats it is an instruct tokenizer: it has their template, and its end of sequence is the end of a turn.
    A copy of another tokenizer is replaced: it is left from a run that stopped before its first checkpoint.
    """
    target = tokenizer_directory(config.run.dir)
    if target.exists() and _is_copy(target, config, data):
        return
    with atomic_directory(target, replace=True) as partial:
        copy_tokenizer_files(Path(config.data.tokenizer), partial)
        if data.chat is not None:
            write_chat_format(partial, data.chat.template, data.chat.end_of_turn_id)


def _is_copy(directory: Path, config: RunConfig, data: RunData) -> bool:
    info = read_tokenizer_info(directory, config.data.mask_token)
    if data.chat is None:
        return (info.fingerprint, info.eos_token_id) == (data.tokenizer.fingerprint, data.tokenizer.eos_token_id)
    template = directory / CHAT_TEMPLATE_NAME
    has_template = template.is_file() and template.read_text(encoding="utf-8") == data.chat.template
    return has_template and (info.fingerprint, info.eos_token_id) == (
        data.tokenizer.fingerprint,
        data.chat.end_of_turn_id,
    )
