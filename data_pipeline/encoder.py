"""Encode records: what every encoder gives, and the encoder of texts (chat/encoder.py is that of chats).

Imported by worker processes, so it must import neither torch nor configuration libraries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from conf.system.errors import UserError
from conf.tokenizer_info import read_tokenizer_info

# The token ids of one document: one segment for a text; for a chat prompt, response, prompt, response, ...
DocumentTokens = list[list[int]]


@dataclass(frozen=True)
class EncodedImage:
    """Holds an image of a document.

    data: the file of the picture. sha256: of it, in hexadecimal. grid: features (height, width). segment: of the
    document, the prompt that it is in. fixes: what is done to show it (images/check.py).
    """

    data: bytes
    sha256: str
    grid: tuple[int, int]
    segment: int
    fixes: tuple[str, ...]


@dataclass(frozen=True)
class PicturedDocument:
    """Holds a chat with images. segments: tokens, those of images included. images: in the order of their tokens."""

    segments: DocumentTokens
    images: list[EncodedImage]


@dataclass(frozen=True)
class Skip:
    """Says why a record gives no document.

    reason: short and the same for all records of the kind; what is counted. detail: of this record.
    """

    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


class RecordEncoder(Protocol):
    """Turns records into documents.

    block_padding_token_id: the token that fills the last block of a document or a response: end-of-sequence of texts,
    end-of-turn of chats.
    """

    block_padding_token_id: int

    def encode(self, values: Sequence[object]) -> Sequence[DocumentTokens | PicturedDocument | Skip]:
        """Return one document or reason per value, in order; values are the column's content as read."""
        ...

    def settings(self) -> dict:
        """Return everything but the tokenizer that decides the tokens, as JSON values."""
        ...


class TextEncoder:
    """Encodes a text and appends the end-of-sequence token. Reserved tokens spelled in a text are ordinary text."""

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int) -> None:
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()  # a tokenizer.json may hold the settings of somebody's last call
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.block_padding_token_id = eos_token_id

    def encode(self, values: Sequence[object]) -> list[DocumentTokens | Skip]:
        """Encode texts; see RecordEncoder."""
        texts = [value for value in values if isinstance(value, str)]
        encodings = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return [self._document(next(encodings).ids) if isinstance(value, str) else _no_text(value) for value in values]

    def settings(self) -> dict:
        """Return no settings; see RecordEncoder."""
        return {}

    def _document(self, ids: list[int]) -> DocumentTokens | Skip:
        if not ids:
            return Skip("empty text")
        ids.append(self.block_padding_token_id)
        return [ids]


def build_text_encoder(tokenizer_dir: Path, mask_token: str) -> RecordEncoder:
    """Build the encoder of the Hugging Face tokenizer in `tokenizer_dir`.

    Raises UserError if the directory is no tokenizer's, or it has no mask token or no end-of-sequence token.
    """
    info = read_tokenizer_info(tokenizer_dir, mask_token)
    if info.eos_token_id is None:
        raise UserError(f"the tokenizer in {tokenizer_dir} names no eos_token: set it in its tokenizer_config.json")
    return TextEncoder(load_tokenizer(tokenizer_dir), info.eos_token_id)


def load_tokenizer(tokenizer_dir: Path) -> Tokenizer:
    """Load the Rust tokenizer in `tokenizer_dir`. Raises UserError if the library cannot read it."""
    path = tokenizer_dir / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{path} is damaged: {error}") from None


def _no_text(value: object) -> Skip:
    return Skip("null text") if value is None else Skip("text is not a string", f"but {type(value).__name__}")
