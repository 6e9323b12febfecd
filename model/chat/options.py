"""What a chat can be asked to do. Imported by the command line: no torch here."""

from dataclasses import dataclass

from conf.errors import UserError

# mode: the entry point of the model that decodes so.
ENTRY_POINTS = {"ar": "ar_generate", "block_diffusion": "generate", "linear_speculation": "linear_spec_generate"}
MODES = tuple(ENTRY_POINTS)


@dataclass(frozen=True)
class DecodeOptions:
    """How answers are decoded.

    mode: one of MODES. max_new_tokens: of one answer, the end of turn included. temperature: 0 is greedy.
    block_length: tokens; None is the checkpoint's block_size. threshold: a probability; None is the entry point's.
    Both are left out where the mode has none (ar).
    """

    mode: str
    max_new_tokens: int
    temperature: float = 0.0
    block_length: int | None = None
    threshold: float | None = None

    def arguments(self) -> dict[str, int | float]:
        """Keyword arguments of the mode's entry point, but for max_new_tokens, which depends on the prompt."""
        blocks = {} if self.mode == "ar" else {"block_length": self.block_length, "threshold": self.threshold}
        given = {name: value for name, value in blocks.items() if value is not None}
        return {"temperature": self.temperature, **given}


def check_text(text: str, what: str) -> str:
    """The text itself. Raises: UserError if it is empty or came from bytes that are not UTF-8."""
    if not text.strip():
        raise UserError(f"{what} is empty: write something")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{what} is not UTF-8 text") from None
    return text
