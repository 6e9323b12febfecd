"""Decode token ids so that every token keeps its place and nothing is lost.

A token of a byte-level vocabulary may be a part of a character: tokens are decoded together until they end where a
character ends.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from conf.system.errors import UserError

PARTIAL = "\ufffd"  # what decoding gives for bytes that are no character
# A document may hold that very character; so byte-level, byte-fallback and plain vocabularies spell it.
SPELLINGS_OF_PARTIAL = ("\u00ef\u00bf\u00bd", "<0xEF><0xBF><0xBD>", PARTIAL)
LONGEST_CHARACTER = 4  # bytes of UTF-8, hence tokens


@dataclass(frozen=True)
class DecodedChunk:
    """Holds the text of `num_tokens` neighbouring tokens. is_special: one token that is no text, like end-of-turn."""

    text: str
    num_tokens: int
    is_special: bool = False


class Decoder(Protocol):
    """Shows tokens."""

    def decode(self, token_ids: Sequence[int]) -> Iterator[DecodedChunk]:
        """Yield chunks of these tokens, in order, each of as many tokens as it takes to end where a character ends."""
        ...

    def name(self, token_id: int) -> str:
        """Return one token as text, by itself; part of a character is the replacement character."""
        ...


class IdDecoder:
    """Shows numbers, where there is no tokenizer."""

    def decode(self, token_ids: Sequence[int]) -> Iterator[DecodedChunk]:
        """Yield each id as text."""
        return (DecodedChunk(f"{token_id} ", 1) for token_id in token_ids)

    def name(self, token_id: int) -> str:
        """Return the id as text."""
        return str(token_id)


class TextDecoder:
    """Shows the text of a Hugging Face tokenizer. Raises UserError if tokenizer.json cannot be loaded."""

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{path} cannot be loaded: {error}") from error
        self._added = set(self._tokenizer.get_added_tokens_decoder())

    def decode(self, token_ids: Sequence[int]) -> Iterator[DecodedChunk]:
        """Yield the text of tokens; see Decoder."""
        former: list[int] = []  # tokenizers that mark words by a leading blank drop it at the beginning of a text
        pending: list[int] = []
        for token_id in token_ids:
            if self._is_special(token_id):
                yield from self._flush(pending)
                yield DecodedChunk(self.name(token_id), 1, is_special=True)
                former, pending = [], []
                continue
            pending.append(token_id)
            text = self._text_after(former, pending)
            if not text.endswith(PARTIAL) or self._spells_partial(pending):
                yield DecodedChunk(text, len(pending))
                former, pending = pending, []
            elif len(pending) == LONGEST_CHARACTER:
                yield DecodedChunk(self.name(pending[0]), 1)
                former, pending = pending[:1], pending[1:]
        yield from self._flush(pending)

    def name(self, token_id: int) -> str:
        """Return one token as text; see Decoder."""
        text = self._tokenizer.id_to_token(token_id)
        if text is None:
            return f"<no token {token_id}>"
        return text if token_id in self._added else self._decode([token_id])

    def _is_special(self, token_id: int) -> bool:
        return token_id in self._added or self._tokenizer.id_to_token(token_id) is None

    def _spells_partial(self, token_ids: list[int]) -> bool:
        return "".join(self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids).endswith(
            SPELLINGS_OF_PARTIAL
        )

    def _flush(self, pending: list[int]) -> Iterator[DecodedChunk]:
        """Yield what a cut character left, token by token; those before it in `pending` may well be whole."""
        return (DecodedChunk(self.name(token_id), 1) for token_id in pending)

    def _text_after(self, former: list[int], token_ids: list[int]) -> str:
        before, text = self._decode(former), self._decode(former + token_ids)
        return text[len(before) :] if text.startswith(before) else self._decode(token_ids)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
