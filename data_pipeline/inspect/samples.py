"""Training sequences as spans of text: what is scored, masked, or only fills rows, exactly as the trainer gets them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

import numpy as np

from data_pipeline.batch import Batch
from data_pipeline.dataset import TokenDataset
from data_pipeline.inspect.decode import Chunk, Decoder
from data_pipeline.noise import NoiseSource, add_noise

NO_MASK_TOKEN = -1  # masked tokens are shown as what they were


class RowKind(Enum):
    """scored: a token whose loss counts. context: one that is only seen. block_padding: fills a last block. padding: no
    token at all."""

    scored = "scored"
    context = "context"
    block_padding = "block_padding"
    padding = "padding"


@dataclass(frozen=True)
class Piece:
    """Text of `num_tokens` neighbouring tokens that are all masked, or none of them; a special token stands alone."""

    text: str
    num_tokens: int
    is_masked: bool
    is_special: bool = False


@dataclass(frozen=True)
class Span:
    """Rows [first_row, end_row) of one kind and document; pieces: their text, one per row of block_padding,
    none of padding."""

    kind: RowKind
    document: int
    first_row: int
    end_row: int
    pieces: list[Piece]


@dataclass(frozen=True)
class Document:
    """Rows from the first to the last of a document within a sequence.

    noise: (t, p): its level and masking probability, None without noise. num_masked of num_maskable: tokens that are
    masked, tokens that could be (scored ones and those that complete a block).
    """

    number: int
    first_row: int
    end_row: int
    noise: tuple[float, float] | None
    num_masked: int
    num_maskable: int


@dataclass(frozen=True)
class Sample:
    """index: of the global sample. rows, masked_rows: number of all and of masked rows of each kind.

    spans: of the first rows_shown rows. documents: by number, of all rows.
    """

    index: int
    rows: dict[RowKind, int]
    masked_rows: dict[RowKind, int]
    documents: dict[int, Document]
    spans: list[Span]
    rows_shown: int

    @property
    def num_rows(self) -> int:
        """Of the sequence."""
        return sum(self.rows.values())


def read_samples(
    dataset: TokenDataset, indices: Iterable[int], decoder: Decoder, noise: NoiseSource | None, rows_shown: int
) -> Iterator[Sample]:
    """Global samples of a run on this data alone; rows_shown: how many rows of each become text, 0: all."""
    for index in indices:
        batch = dataset.build_sequence(index, index)
        yield describe_sample(batch, decoder, noise, rows_shown or dataset.form.sequence_length)


def describe_sample(batch: Batch, decoder: Decoder, noise: NoiseSource | None, rows_shown: int) -> Sample:
    """The one sequence [1, S] of a batch, masked by `noise`."""
    index = int(batch.sample_indices[0])
    masked, p_mask = np.zeros(batch.tokens.shape[1], dtype=bool), None
    if noise is not None:
        noisy = add_noise(batch, noise, NO_MASK_TOKEN)
        masked, p_mask = noisy.masked[0].numpy(), noisy.p_mask[0].numpy()
    kinds = classify_rows(batch)
    documents = batch.document_ids[0].numpy()
    is_maskable = (batch.loss_mask | batch.block_padding)[0].numpy()
    described = {}
    for number in np.unique(documents[documents >= 0]).tolist():
        rows = np.flatnonzero(documents == number)
        levels = None
        if noise is not None and p_mask is not None:
            levels = noise.draw(index, number, 0)[0], float(p_mask[rows[0]])
        counts = int(masked[rows].sum()), int(is_maskable[rows].sum())
        described[number] = Document(number, int(rows[0]), int(rows[-1]) + 1, levels, *counts)
    return Sample(
        index=index,
        rows={kind: int((kinds == kind).sum()) for kind in RowKind},
        masked_rows={kind: int(masked[kinds == kind].sum()) for kind in RowKind},
        documents=described,
        spans=list(_find_spans(batch, kinds, masked, decoder, rows_shown)),
        rows_shown=min(rows_shown, len(kinds)),
    )


def classify_rows(batch: Batch) -> np.ndarray:
    """[S] RowKind of every row of the sequence [1, S] of a batch."""
    kinds = np.full(batch.tokens.shape[1], RowKind.context, dtype=object)
    kinds[batch.loss_mask[0].numpy()] = RowKind.scored
    kinds[batch.block_padding[0].numpy()] = RowKind.block_padding
    kinds[batch.document_ids[0].numpy() < 0] = RowKind.padding
    return kinds


def _find_spans(
    batch: Batch, kinds: np.ndarray, masked: np.ndarray, decoder: Decoder, rows_shown: int
) -> Iterator[Span]:
    tokens, documents = batch.tokens[0].tolist(), batch.document_ids[0].tolist()
    rows = range(min(rows_shown, len(tokens)))
    for (kind, document), group in groupby(rows, key=lambda row: (kinds[row], documents[row])):
        inside = list(group)
        first, end = inside[0], inside[-1] + 1
        inside_tokens, inside_masked = tokens[first:end], masked[first:end].tolist()
        pieces: list[Piece] = []
        if kind is RowKind.block_padding:  # one token again and again, which is not text
            pieces = [Piece(decoder.name(t), 1, m, True) for t, m in zip(inside_tokens, inside_masked, strict=True)]
        elif kind is not RowKind.padding:
            pieces = decode_pieces(inside_tokens, inside_masked, decoder)
        yield Span(kind, document, first, end, pieces)


def decode_pieces(token_ids: list[int], masked: list[bool], decoder: Decoder) -> list[Piece]:
    """Text of tokens; a character of which only some tokens are masked becomes one replacement mark per token."""
    pieces, first = [], 0
    for chunk in decoder.decode(token_ids):
        pieces += _cut(chunk, token_ids[first : first + chunk.num_tokens], masked[first:], decoder)
        first += chunk.num_tokens
    return list(_join(pieces))


def _cut(chunk: Chunk, token_ids: list[int], masked: list[bool], decoder: Decoder) -> list[Piece]:
    if len(set(masked[: chunk.num_tokens])) == 1:
        return [Piece(chunk.text, chunk.num_tokens, masked[0], chunk.is_special)]
    return [Piece(decoder.name(token), 1, is_masked) for token, is_masked in zip(token_ids, masked, strict=False)]


def _join(pieces: list[Piece]) -> Iterator[Piece]:
    for (is_masked, is_special), group in groupby(pieces, key=lambda piece: (piece.is_masked, piece.is_special)):
        if is_special:
            yield from group
        else:
            joined = list(group)
            text, num_tokens = "".join(piece.text for piece in joined), sum(piece.num_tokens for piece in joined)
            yield Piece(text, num_tokens, is_masked)
