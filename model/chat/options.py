"""What a chat can be asked to do. Imported by the command line: no torch here."""

from dataclasses import dataclass, fields
from typing import Any

from conf.system.errors import UserError


@dataclass(frozen=True)
class ChatOptions:
    """How answers are decoded.

    mode: one of MODES. max_new_tokens: of one answer, the end of turn included. The others as in the shipped
    DecodeOptions, whose defaults None takes.
    """

    mode: str
    max_new_tokens: int
    temperature: float = 0.0
    block_length: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    threshold: float | None = None
    mask_groups: int | None = None
    thinking_budget: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Fields of DecodeOptions, but for max_new_tokens, which depends on the prompt."""
        own = {"mode", "max_new_tokens"}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in own}


def check_text(text: str, what: str) -> str:
    """The text itself. Raises: UserError if it is empty or came from bytes that are not UTF-8."""
    if not text.strip():
        raise UserError(f"{what} is empty: write something")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{what} is not UTF-8 text") from None
    return text
