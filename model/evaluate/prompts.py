"""Prompts of an evaluation: read from JSON-lines files, checked against the model, grouped into batches.

In addition to what model/commands/prompt_records.py describes, a record may hold `group`, the name it is reported under
(default: the file's name), `answer`, a text, a number or a list of accepted ones that the response is scored by, and
`choices`, texts that are scored themselves (choices.py).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.system.errors import UserError
from model.commands.prompt_images import ReadImage
from model.commands.prompt_records import encode_prompt_record, read_prompt_records, refuse_mask_token
from model.evaluate.choices import Choices, read_choices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from model.export.images import PromptImage


@dataclass(frozen=True)
class EvaluationPrompt:
    """One prompt.

    Attributes:
        token_ids: the prompt's tokens, at least one.
        group: the name it is reported under.
        place: file and line, for error messages.
        answers: accepted answers; None if the response is not scored.
        choices: those of a multiple-choice question; None if it is not one.
        images: those whose tokens the prompt has, in their order; opened by the reader that read_prompts got.
    """

    token_ids: list[int]
    group: str
    place: str
    answers: tuple[str, ...] | None = None
    choices: Choices | None = None
    images: "tuple[PromptImage, ...]" = ()


def read_prompts(
    paths: Sequence[Path],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    prompt_tokens: int,
    limit: int | None = None,
    read_image: ReadImage | None = None,
) -> list[EvaluationPrompt]:
    """Read all prompts in the order of files and lines.

    Args:
        paths: .jsonl files.
        tokenizer: the checkpoint's.
        prompt_tokens: how many tokens of a `text` are the prompt.
        limit: take only so many prompts of each group, the first ones.
        read_image: opens images for the checkpoint (model.export.images); None if it reads text alone.

    Raises:
        UserError: a record is not a prompt or an empty one (file and line are named), or there are none at all.
    """
    prompts: list[EvaluationPrompt] = []
    taken: Counter[str] = Counter()
    for path in paths:
        for place, record in read_prompt_records(path):
            group = _read_group(record, place, path.stem)
            if limit is not None and taken[group] == limit:
                continue
            taken[group] += 1
            encoded = encode_prompt_record(
                record, place, tokenizer, prompt_tokens=prompt_tokens, folder=path.parent, read_image=read_image
            )
            answers = _read_answers(record, place)
            choices = read_choices(record, answers, place, tokenizer)
            prompts.append(EvaluationPrompt(encoded.token_ids, group, place, answers, choices, encoded.images))
    if not prompts:
        raise UserError(f"there are no prompts in {', '.join(map(str, paths))}: give one JSON object per line")
    return prompts


def check_masks(prompts: Sequence[EvaluationPrompt], mask_token_id: int) -> None:
    """Refuse prompts that contain the mask token. Raises: UserError."""
    for prompt in prompts:
        refuse_mask_token(prompt.token_ids, prompt.place, mask_token_id)


def check_room(prompts: Sequence[EvaluationPrompt], max_new_tokens: int, max_positions: int) -> None:
    """Refuse prompts that, with their response, exceed the model's positions. Raises: UserError."""
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    length = len(longest.token_ids)
    if length + max_new_tokens > max_positions:
        raise UserError(
            f"{longest.place}: the prompt has {length} tokens; with {max_new_tokens} new ones it exceeds the model's "
            f"{max_positions} positions: shorten it, or lower --max-new-tokens"
        )


def check_choices(prompts: Sequence[EvaluationPrompt], block_length: int, max_positions: int) -> None:
    """Refuse choices longer than a block, which the masks that score them fill, or the positions. Raises: UserError."""
    for prompt in prompts:
        if prompt.choices is None:
            continue
        length, longest = len(prompt.token_ids), prompt.choices.longest
        if longest > block_length:
            raise UserError(
                f"{prompt.place}: a choice has {longest} tokens, but the masks that score it fit into a block of "
                f"{block_length}: shorten it, or raise --block-length"
            )
        if length + longest > max_positions:
            raise UserError(
                f"{prompt.place}: the prompt has {length} tokens; with a choice of {longest} it exceeds the model's "
                f"{max_positions} positions: shorten it"
            )


def _read_group(record: dict[str, Any], place: str, default: str) -> str:
    group = record.get("group")
    if group is None:
        return default
    if not isinstance(group, str) or not group.strip():
        raise UserError(f'{place}: "group" must be a name, not {group!r}')
    return group


def _read_answers(record: dict[str, Any], place: str) -> tuple[str, ...] | None:
    answer = record.get("answer")
    if answer is None:
        return None
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(_is_answer(value) for value in answers):
        raise UserError(f'{place}: "answer" must be text, a number or a list of those, not {answer!r}')
    return tuple(map(str, answers))


def _is_answer(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else type(value) in (int, float)


def make_batches(prompts: Sequence[EvaluationPrompt], batch_size: int) -> list[list[EvaluationPrompt]]:
    """Batch prompts within their groups, so that each group has its own numbers; ordered by first prompt."""
    batches: list[list[EvaluationPrompt]] = []
    filling: dict[str, list[EvaluationPrompt]] = {}
    for prompt in prompts:
        batch = filling.get(prompt.group)
        if batch is None or len(batch) == batch_size:
            batch = filling[prompt.group] = []
            batches.append(batch)
        batch.append(prompt)
    return batches
