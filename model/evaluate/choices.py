"""The choices of multiple-choice questions: read from records, encoded. No torch.

A record with `choices`, a list of texts, is a question; its `answer` names the right one, or several of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conf.system.errors import UserError
from model.commands.prompt_records import check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Choices:
    """The choices of one question; all tuples are in their order.

    Attributes:
        texts: as in the record.
        token_ids: of each text, at least one.
        correct: whether the record's answer names it.
    """

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    correct: tuple[bool, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest choice."""
        return max(map(len, self.token_ids))


def read_choices(
    record: dict[str, Any], answers: Sequence[str] | None, place: str, tokenizer: "PreTrainedTokenizerFast"
) -> Choices | None:
    """Read the choices of a record; None if it has none.

    They are encoded by themselves and follow the prompt as they are: a space that belongs between the two stands in
    one of them. Reserved tokens in them are encoded as plain characters.

    Args:
        record: one line of a prompt file.
        answers: its accepted answers; they are compared with the choices without white space around them.
        place: file and line, for error messages.
        tokenizer: the checkpoint's.

    Raises:
        UserError: there are not two different texts, or none or all of them are right.
    """
    values = record.get("choices")
    if values is None:
        return None
    if not isinstance(values, list) or len(values) < 2:
        raise UserError(f'{place}: "choices" must be a list of two texts or more, not {values!r}')
    texts = tuple(check_text(value, f'{place}: a text of "choices"') for value in values)
    encoded = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    token_ids: tuple[tuple[int, ...], ...] = tuple(map(tuple, encoded))  # pyright: ignore[reportArgumentType]
    if len(set(token_ids)) < len(token_ids):
        raise UserError(f'{place}: "choices" holds the same text twice: {values!r}')
    accepted = {answer.strip() for answer in answers or ()}
    correct = tuple(text.strip() in accepted for text in texts)
    if not any(correct) or all(correct):
        raise UserError(f'{place}: "answer" must name the right one of "choices", as it is written there')
    return Choices(texts, token_ids, correct)
