"""Rows of .jsonl files as prompts: one JSON object per line, the tokens of one prompt each.

A row is {"prompt": text}, encoded as the tokenizer does, reserved tokens in it included; {"messages": [...]}, rendered
by the chat template up to where the assistant begins to speak (an answer at the end is left out); or {"text": text},
of which the first tokens are continued, encoded as training data is. Beside messages the other two do not count: data
sets of chats repeat the first question or the whole chat there.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KINDS = ("prompt", "messages", "text")
MESSAGE_KEYS = {"role", "content"}


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place (file and line) and object of every line that is not blank.

    Raises: UserError if the file cannot be read, or naming the line that is no JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file: give .jsonl files, one prompt per line")
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: give .jsonl files, one prompt per line") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def lacks_answer(row: dict[str, Any]) -> bool:
    """Whether there is nothing in a row but a prompt: a text is its own answer, a chat ends with one."""
    messages = row.get("messages")
    if messages is None:
        return row.get("text") is None and row.get("prompt") is not None
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") != "assistant"


def encode_row(
    row: dict[str, Any], place: str, tokenizer: "PreTrainedTokenizerFast", *, prompt_tokens: int
) -> list[int]:
    """The prompt's tokens, at least one. place: names the row in errors. prompt_tokens: of a text.

    Raises: UserError for what is no prompt or an empty one.
    """
    kind = _find_kind(row, place)
    if kind == "messages":
        token_ids = _encode_chat(row[kind], place, tokenizer)
    else:
        token_ids = _encode_text(_check_text(row[kind], f'{place}: "{kind}"'), kind, tokenizer, prompt_tokens)
    if not token_ids:
        raise UserError(f"{place}: the {kind} gives no tokens: give some text")
    return token_ids


def check_mask(token_ids: list[int], place: str, mask_token_id: int) -> None:
    """Raises: UserError if a prompt holds the mask token. place: names the row."""
    if mask_token_id in token_ids:
        raise UserError(
            f"{place}: the prompt holds the mask token (id {mask_token_id}), which stands for what is to be predicted: "
            'remove it, or give the prompt as "text", where reserved tokens are spelled out'
        )


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{place} is no JSON object but {type(row).__name__}")
    return row


def _find_kind(row: dict[str, Any], place: str) -> str:
    kinds = [kind for kind in KINDS if row.get(kind) is not None]
    if "messages" in kinds:
        return "messages"
    if len(kinds) != 1:
        raise UserError(f"{place} has {' and '.join(kinds) or 'none'} of {', '.join(KINDS)}: give exactly one")
    return kinds[0]


def _encode_text(text: str, kind: str, tokenizer: "PreTrainedTokenizerFast", prompt_tokens: int) -> list[int]:
    if kind == "prompt":
        return tokenizer(text)["input_ids"]  # pyright: ignore[reportReturnType]
    encoded: Any = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return encoded["input_ids"][:prompt_tokens]


def _encode_chat(messages: Any, place: str, tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    if not tokenizer.chat_template:
        raise UserError(
            f'{place} has "messages", but the checkpoint has no chat template: put chat_template.jinja there (training '
            'takes chat_template=chatml), or give "prompt" or "text"'
        )
    try:
        encoded: Any = tokenizer.apply_chat_template(
            _check_messages(messages, place), add_generation_prompt=True, return_dict=True
        )
    except UserError:
        raise
    except Exception as error:  # whatever a template raises
        raise UserError(f"{place}: the checkpoint's chat template refuses the messages: {error}") from None
    return encoded["input_ids"]


def _check_messages(messages: Any, place: str) -> list[dict[str, Any]]:
    """The messages before an answer at the end."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) and m.keys() >= MESSAGE_KEYS for m in messages):
        raise UserError(f'{place}: "messages" must be a list of objects with role and content')
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError(f'{place}: "messages" holds nothing to answer')
    _check_text(messages[-1]["content"], f"{place}: content of the last message")
    return messages


def _check_text(value: Any, what: str) -> str:
    """Raises: UserError unless it is text that is not blank and can be encoded."""
    if not isinstance(value, str):
        raise UserError(f"{what} must be text, not {type(value).__name__}")
    if not value.strip():
        raise UserError(f"{what} is empty: give some text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not valid Unicode (half a character)") from None
    return value
