"""Prompts of the user's .jsonl files (see lora.prompt_rows) in groups.

`group` (a name) in a row sorts prompts into groups; by default it is the file's name.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from conf.errors import UserError
from lora.evaluation.records import Prompt
from lora.prompt_rows import encode_row, read_rows


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
        for place, row in read_rows(path):
            group = _read_group(row, place, path.stem)
            if limit is not None and taken[group] == limit:
                continue
            taken[group] += 1
            prompts.append(Prompt(encode_row(row, place, tokenizer, prompt_tokens=prompt_tokens), group, place))
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


def _read_group(row: dict[str, Any], place: str, default: str) -> str:
    group = row.get("group")
    if group is None:
        return default
    if not isinstance(group, str) or not group.strip():
        raise UserError(f'{place}: "group" must be a name, not {group!r}')
    return group
