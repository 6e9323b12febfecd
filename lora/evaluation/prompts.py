"""Prompts of the user's .jsonl files as token ids.

A row is {"prompt": text}, encoded as the tokenizer does, reserved tokens in it included; {"messages": [...]}, rendered
by the chat template up to where the assistant begins to speak (an answer at the end is left out); or {"text": text},
of which the first tokens are continued, encoded as training data is. `group` (a name) sorts prompts into groups; by
default it is the file's name.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from conf.errors import UserError
from lora.evaluation.records import Prompt

KINDS = ("prompt", "messages", "text")
MESSAGE_KEYS = {"role", "content"}


def read_prompts(
    paths: Sequence[Path], tokenizer: PreTrainedTokenizerFast, *, prompt_tokens: int, limit: int | None = None
) -> list[Prompt]:
    """All prompts, in the order of files and lines.

    prompt_tokens: of a text. limit: prompts per group at most, the first ones.

    Raises: UserError naming file and line of what is no prompt or an empty one, or if there is none at all.
    """
    prompts: list[Prompt] = []
    taken: Counter[str] = Counter()
    for path in paths:
        for place, row in _read_rows(path):
            group = _read_group(row, place, path.stem)
            if limit is not None and taken[group] == limit:
                continue
            taken[group] += 1
            prompts.append(Prompt(_encode(row, place, tokenizer, prompt_tokens), group, place))
    if not prompts:
        raise UserError(f"there are no prompts in {', '.join(map(str, paths))}: give one JSON object per line")
    return prompts


def check_room(prompts: Sequence[Prompt], max_new_tokens: int, max_positions: int) -> None:
    """Raises: UserError if a prompt and its answer do not fit into the model's positions."""
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    length = len(longest.token_ids)
    if length + max_new_tokens > max_positions:
        raise UserError(
            f"{longest.place}: the prompt has {length} tokens; with {max_new_tokens} new ones it exceeds the model's "
            f"{max_positions} positions: shorten it, or lower --max-new-tokens"
        )


def _read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and object of every line that is not blank."""
    if not path.is_file():
        raise UserError(f"{path} is no file: give .jsonl files, one prompt per line")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: give .jsonl files, one prompt per line") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{place} is no JSON object but {type(row).__name__}")
        yield place, row


def _read_group(row: dict[str, Any], place: str, default: str) -> str:
    group = row.get("group")
    if group is None:
        return default
    if not isinstance(group, str) or not group.strip():
        raise UserError(f'{place}: "group" must be a name, not {group!r}')
    return group


def _encode(row: dict[str, Any], place: str, tokenizer: PreTrainedTokenizerFast, prompt_tokens: int) -> list[int]:
    kinds = [kind for kind in KINDS if row.get(kind) is not None]
    if len(kinds) != 1:
        raise UserError(f"{place} has {' and '.join(kinds) or 'none'} of {', '.join(KINDS)}: give exactly one")
    value = row[kinds[0]]
    if kinds[0] == "messages":
        token_ids = _encode_chat(value, place, tokenizer)
    else:
        token_ids = _encode_text(_check_text(value, f'{place}: "{kinds[0]}"'), kinds[0], tokenizer, prompt_tokens)
    if not token_ids:
        raise UserError(f"{place}: the {kinds[0]} gives no tokens: give some text")
    return token_ids


def _encode_text(text: str, kind: str, tokenizer: PreTrainedTokenizerFast, prompt_tokens: int) -> list[int]:
    if kind == "prompt":
        return tokenizer(text)["input_ids"]  # pyright: ignore[reportReturnType]
    encoded: Any = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return encoded["input_ids"][:prompt_tokens]


def _encode_chat(messages: Any, place: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    if not tokenizer.chat_template:
        raise UserError(f'{place} has "messages", but the checkpoint has no chat template: give "prompt" or "text"')
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
