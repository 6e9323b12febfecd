"""Prompts of the user's .jsonl files (see model.prompt_rows) in groups, with the answers that are accepted.

`group` (a name) in a row sorts prompts into groups; by default it is the file's name. `answer` (a text or a number, or
a list any of which will do) says what the response should come to.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from conf.system.errors import UserError
from model.evaluate.records import Prompt
from model.export.prompt_rows import check_mask, encode_row, read_rows


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
            tokens = encode_row(row, place, tokenizer, prompt_tokens=prompt_tokens)
            prompts.append(Prompt(tokens, group, place, _read_answers(row, place)))
    if not prompts:
        raise UserError(f"there are no prompts in {', '.join(map(str, paths))}: give one JSON object per line")
    return prompts


def check_masks(prompts: Sequence[Prompt], mask_token_id: int) -> None:
    """Raises: UserError if a prompt holds the mask token."""
    for prompt in prompts:
        check_mask(prompt.token_ids, prompt.place, mask_token_id)


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


def _read_answers(row: dict[str, Any], place: str) -> tuple[str, ...] | None:
    answer = row.get("answer")
    if answer is None:
        return None
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(_is_answer(value) for value in answers):
        raise UserError(f'{place}: "answer" must be text, a number or a list of those, not {answer!r}')
    return tuple(map(str, answers))


def _is_answer(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else type(value) in (int, float)


def make_batches(prompts: Sequence[Prompt], batch_size: int) -> list[list[Prompt]]:
    """Batches within groups, so that groups have numbers of their own; ordered by their first prompts."""
    batches: list[list[Prompt]] = []
    filling: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        batch = filling.get(prompt.group)
        if batch is None or len(batch) == batch_size:
            batch = filling[prompt.group] = []
            batches.append(batch)
        batch.append(prompt)
    return batches
