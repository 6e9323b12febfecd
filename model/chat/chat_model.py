"""Loads what a chat needs from an export: model, tokenizer with a chat template, stop tokens and draft adapter."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from conf.system.errors import UserError
from model.export.draft_adapter import ADAPTER_FOLDER
from model.export.images import ImageReader, load_image_reader
from model.export.load import (
    attach_adapter,
    check_export,
    check_vocabulary,
    find_stop_ids,
    load_export,
    load_export_tokenizer,
    resolve_device,
)
from model.hf.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel


@dataclass(frozen=True)
class ChatModel:
    """A loaded checkpoint.

    stop_ids: tokens that end a response. has_adapter: whether a draft adapter drafts. read_image: opens images; None if
    the checkpoint reads text alone.
    """

    model: NemotronLabsDiffusionModel
    tokenizer: PreTrainedTokenizerFast
    stop_ids: tuple[int, ...]
    has_adapter: bool
    read_image: ImageReader | None = None


def load_chat_model(
    directory: Path, *, dtype: str | None = None, device: str | None = None, use_adapter: bool = True
) -> ChatModel:
    """Load an export, ours or a released one; it is checked before weights are read.

    Args:
        directory: folder in the exported format.
        dtype: as in load_export.
        device: as in load_export.
        use_adapter: attach the draft adapter in linear_spec_lora/ if there is one.

    Raises:
        UserError: the directory is not an export, lacks what a chat needs, or does not fit the device.
    """
    check_export(directory)
    resolve_device(device)
    tokenizer = _load_chat_tokenizer(directory)
    read_image = load_image_reader(directory, tokenizer)
    model = load_export(directory, dtype=dtype, device=device)
    check_vocabulary(directory, tokenizer, model.config.vocab_size)
    has_adapter = use_adapter and (directory / ADAPTER_FOLDER).is_dir()
    if has_adapter:
        _attach_adapter(model, directory / ADAPTER_FOLDER)
    return ChatModel(model, tokenizer, find_stop_ids(model), has_adapter, read_image)


def _load_chat_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    tokenizer = load_export_tokenizer(directory)
    if not tokenizer.chat_template:
        raise UserError(
            f"{directory} has no chat_template.jinja (nor a chat_template in tokenizer_config.json): it is a base "
            "model; chat with an instruct one, or put the template it was trained with there"
        )
    return tokenizer


def _attach_adapter(model: NemotronLabsDiffusionModel, folder: Path) -> None:
    try:
        attach_adapter(model, folder)
    except UserError as error:
        raise UserError(f"{error}; --no-adapter chats without it") from None
