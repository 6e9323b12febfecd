"""Prompts from JSON-lines files: one JSON object, called a record, per line.

A record holds one of four things:

    {"prompt": text}      encoded as the tokenizer does it, reserved tokens included
    {"messages": [...]}   rendered by the chat template up to where the assistant speaks; a final response is left out
    {"texts": [...]}      the same from FineVision's pairs of user and assistant
    {"text": text}        encoded as training data is; its first tokens are the prompt

If a record has messages, its prompt and text are ignored: chat data sets often repeat the first question or the whole
chat there. Tools beside the messages ({"tools": [...]}) are handed to the chat template. All but texts may have images
(prompt_images.py).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.system.errors import UserError
from model.commands.prompt_images import (
    ReadImage,
    expand_images,
    open_images,
    read_images,
    read_turns,
    write_image_places,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from model.export.images import PromptImage

KINDS = ("prompt", "messages", "texts", "text")
MESSAGE_KEYS = {"role", "content"}


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's token ids, at least one, and its images in the order of their tokens."""

    token_ids: list[int]
    images: "tuple[PromptImage, ...]" = ()


def read_prompt_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place (file and line) and the JSON object of every line that is not blank.

    Raises:
        UserError: the file cannot be read, or a line (which is named) is not a JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file: give .jsonl files, one prompt per line")
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: give .jsonl files, one prompt per line") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def lacks_response(record: dict[str, Any]) -> bool:
    """Return whether a record is only a prompt: a text continues itself, and a complete chat ends with a response."""
    messages, turns = record.get("messages"), record.get("texts")
    if messages is None and isinstance(turns, list) and turns:
        return isinstance(turns[-1], dict) and turns[-1].get("assistant") is None
    if messages is None:
        return record.get("text") is None and record.get("prompt") is not None
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") != "assistant"


def encode_prompt_record(
    record: dict[str, Any],
    place: str,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    prompt_tokens: int,
    folder: Path = Path(),
    read_image: ReadImage | None = None,
) -> EncodedPrompt:
    """Encode a prompt.

    Args:
        record: one of the kinds above.
        place: file and line, for error messages.
        tokenizer: the checkpoint's.
        prompt_tokens: how many tokens of a `text` are the prompt.
        folder: the one that paths of images are relative to.
        read_image: opens images for the checkpoint; None if it reads text alone.

    Raises:
        UserError: the record is not a prompt, or an empty one, or its images cannot be used.
    """
    kind = _find_kind(record, place)
    token_ids, sources = _encode(record, kind, place, tokenizer, prompt_tokens)
    if not token_ids:
        raise UserError(f"{place}: the {kind} gives no tokens: write some text")
    images = open_images(sources, folder, place, read_image)
    if read_image is not None and kind != "text":
        token_ids = expand_images(token_ids, images, place)
    return EncodedPrompt(token_ids, images)


def _encode(
    record: dict[str, Any], kind: str, place: str, tokenizer: "PreTrainedTokenizerFast", prompt_tokens: int
) -> tuple[list[int], list[Any]]:
    """Return the token ids, one for each image, and the images as the record has them."""
    images = read_images(record.get("images"), place)
    if kind == "text":
        if images:
            raise UserError(f'{place} has "images" beside "text": give "messages" or "prompt", where they have a place')
        return _encode_text(check_text(record[kind], f'{place}: "{kind}"'), tokenizer, prompt_tokens), []
    if kind == "prompt":
        (message,), sources = _place([{"role": "user", "content": record[kind]}], images, place, f'{place}: "{kind}"')
        return tokenizer(message["content"])["input_ids"], sources  # pyright: ignore[reportReturnType]
    messages = read_turns(record[kind], place) if kind == "texts" else record[kind]
    messages = _check_messages(messages, place)
    messages, sources = _place(messages, images, place, f"{place}: content of the last message")
    return _encode_chat(messages, record.get("tools"), place, tokenizer), sources


def _place(messages: Any, images: list[Any], place: str, what: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Place images in texts; refuse a last text that says nothing, not even by an image."""
    if not isinstance(messages[-1]["content"], list):
        check_text(messages[-1]["content"], what)
    messages, sources = write_image_places(messages, images, place)
    check_text(messages[-1]["content"], what)
    return messages, sources


def refuse_mask_token(token_ids: list[int], place: str, mask_token_id: int) -> None:
    """Refuse a prompt that contains the mask token. Raises: UserError naming its place."""
    if mask_token_id in token_ids:
        raise UserError(
            f"{place}: the prompt contains the mask token (id {mask_token_id}), which marks what is to be predicted: "
            'remove it, or give the prompt as "text", where reserved tokens are encoded as plain characters'
        )


def check_text(value: Any, what: str) -> str:
    """Return the text itself. Raises: UserError, naming `what`, unless it is non-blank text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise UserError(f"{what} must be text, not {type(value).__name__}")
    if not value.strip():
        raise UserError(f"{what} is empty: write some text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not valid UTF-8 text") from None
    return value


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{place} is not a JSON object but {type(record).__name__}")
    return record


def _find_kind(record: dict[str, Any], place: str) -> str:
    kinds = [kind for kind in KINDS if record.get(kind) is not None]
    for chat in ("messages", "texts"):
        if chat in kinds:
            return chat
    if len(kinds) != 1:
        raise UserError(f"{place} has {' and '.join(kinds) or 'none'} of {', '.join(KINDS)}: give exactly one")
    return kinds[0]


def _encode_text(text: str, tokenizer: "PreTrainedTokenizerFast", prompt_tokens: int) -> list[int]:
    encoded: Any = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return encoded["input_ids"][:prompt_tokens]


def _encode_chat(messages: Any, tools: Any, place: str, tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    if not tokenizer.chat_template:
        raise UserError(
            f'{place} has "messages", but the checkpoint has no chat template: put chat_template.jinja there (training '
            'takes chat_template=chatml), or give "prompt" or "text"'
        )
    tools = _check_tools(tools, place)
    token_ids = _apply_template(messages, tools, place, tokenizer)
    if tools and token_ids == _apply_template(messages, None, place, tokenizer):
        raise UserError(f"{place}: the checkpoint's chat template does not write tools: describe them in a message")
    return token_ids


def _apply_template(messages: Any, tools: Any, place: str, tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_dict=True
        )
    except Exception as error:  # a template may raise anything
        raise UserError(f"{place}: the checkpoint's chat template rejects the messages: {error}") from None
    return encoded["input_ids"]


def _check_tools(tools: Any, place: str) -> list[dict[str, Any]] | None:
    """Return the tools, given as a list or as its JSON; None if there are none."""
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    except ValueError:
        raise UserError(f'{place}: "tools" is text that is no JSON') from None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f'{place}: "tools" must be a list of objects that describe functions')
    return tools or None


def _check_messages(messages: Any, place: str) -> list[dict[str, Any]]:
    """Return the messages without a response at the end."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) and m.keys() >= MESSAGE_KEYS for m in messages):
        raise UserError(f'{place}: "messages" must be a list of objects with role and content')
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError(f'{place}: "messages" contains nothing to respond to')
    return messages
