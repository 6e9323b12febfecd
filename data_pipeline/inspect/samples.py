"""Describe training sequences as spans of text: what is scored, masked or padding, exactly as the trainer gets it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

import numpy as np

from data_pipeline.batch import Batch
from data_pipeline.dataset import TokenDataset
from data_pipeline.inspect.decode import DecodedChunk, Decoder
from data_pipeline.noise import NoiseSource, add_noise
from model.hf.image_tokens import Grid, count_image_tokens

NO_MASK_TOKEN = -1  # masked tokens are shown as what they were


class PositionKind(Enum):
    """Says what stands at a position of a sequence.

    scored: a token whose loss counts. prompt: one that is only seen. block_padding: one that fills a last block.
    padding: no token at all.
    """

    scored = "scored"
    prompt = "prompt"
    block_padding = "block padding"
    padding = "padding"


@dataclass(frozen=True)
class ShownChunk:
    """Holds the text of `num_tokens` neighbouring tokens, all masked or none of them; a special token stands alone."""

    text: str
    num_tokens: int
    is_masked: bool
    is_special: bool = False


@dataclass(frozen=True)
class Span:
    """Holds the positions [start, end) of one kind and document.

    chunks: their text; one per position of block padding, none of padding.
    """

    kind: PositionKind
    document: int
    start: int
    end: int
    chunks: list[ShownChunk]


@dataclass(frozen=True)
class SampledDocument:
    """Describes a document within a sequence. start, end: its positions [start, end).

    noise: (t, p): its level and masking probability, None without noise. num_masked of num_maskable: tokens that are
    masked, tokens that could be (scored ones and block padding).
    """

    number: int
    start: int
    end: int
    noise: tuple[float, float] | None
    num_masked: int
    num_maskable: int


@dataclass(frozen=True)
class Sample:
    """Describes one sequence. index: of the global sample.

    num_positions, num_masked: all and masked positions of each kind. documents: by number, of the whole sequence.
    spans: of the first num_shown positions.
    """

    index: int
    num_positions: dict[PositionKind, int]
    num_masked: dict[PositionKind, int]
    documents: dict[int, SampledDocument]
    spans: list[Span]
    num_shown: int

    @property
    def sequence_length(self) -> int:
        """Return the number of positions, of all kinds."""
        return sum(self.num_positions.values())


def read_samples(
    dataset: TokenDataset, indices: Iterable[int], decoder: Decoder, noise: NoiseSource | None, num_shown: int
) -> Iterator[Sample]:
    """Yield global samples of a run on this data alone. num_shown: positions of each that become text; 0: all."""
    for index in indices:
        batch = dataset.build_sequence(index, index)
        yield describe_sample(batch, decoder, noise, num_shown or dataset.form.sequence_length)


def describe_sample(batch: Batch, decoder: Decoder, noise: NoiseSource | None, num_shown: int) -> Sample:
    """Describe the one sequence [1, S] of a batch, masked by `noise`."""
    index = int(batch.sample_indices[0])
    masked, p_mask = np.zeros(batch.tokens.shape[1], dtype=bool), None
    if noise is not None:
        noisy = add_noise(batch, noise, NO_MASK_TOKEN)
        masked, p_mask = noisy.masked[0].numpy(), noisy.p_mask[0].numpy()
    kinds = classify_positions(batch)
    documents = batch.document_ids[0].numpy()
    is_maskable = (batch.loss_mask | batch.block_padding)[0].numpy()
    described = {}
    for number in np.unique(documents[documents >= 0]).tolist():
        inside = np.flatnonzero(documents == number)
        levels = None
        if noise is not None and p_mask is not None:
            levels = noise.draw(index, number, 0)[0], float(p_mask[inside[0]])
        counts = int(masked[inside].sum()), int(is_maskable[inside].sum())
        described[number] = SampledDocument(number, int(inside[0]), int(inside[-1]) + 1, levels, *counts)
    return Sample(
        index=index,
        num_positions={kind: int((kinds == kind).sum()) for kind in PositionKind},
        num_masked={kind: int(masked[kinds == kind].sum()) for kind in PositionKind},
        documents=described,
        spans=list(_find_spans(batch, kinds, masked, decoder, num_shown)),
        num_shown=min(num_shown, len(kinds)),
    )


def classify_positions(batch: Batch) -> np.ndarray:
    """Return [S] the PositionKind of every position of the sequence [1, S] of a batch."""
    kinds = np.full(batch.tokens.shape[1], PositionKind.prompt, dtype=object)
    kinds[batch.loss_mask[0].numpy()] = PositionKind.scored
    kinds[batch.block_padding[0].numpy()] = PositionKind.block_padding
    kinds[batch.document_ids[0].numpy() < 0] = PositionKind.padding
    return kinds


def _find_spans(
    batch: Batch, kinds: np.ndarray, masked: np.ndarray, decoder: Decoder, num_shown: int
) -> Iterator[Span]:
    tokens, documents = batch.tokens[0].tolist(), batch.document_ids[0].tolist()
    positions = range(min(num_shown, len(tokens)))
    for (kind, document), group in groupby(positions, key=lambda position: (kinds[position], documents[position])):
        inside = list(group)
        start, end = inside[0], inside[-1] + 1
        inside_tokens, inside_masked = tokens[start:end], masked[start:end].tolist()
        chunks: list[ShownChunk] = []
        if kind is PositionKind.block_padding:  # one token again and again, which is not text
            named = zip(map(decoder.name, inside_tokens), inside_masked, strict=True)
            chunks = [ShownChunk(name, 1, is_masked, is_special=True) for name, is_masked in named]
        elif kind is not PositionKind.padding:
            chunks = decode_with_images(inside_tokens, inside_masked, decoder, _find_images(batch, start, end))
        yield Span(kind, document, start, end, chunks)


def _find_images(batch: Batch, start: int, end: int) -> list[tuple[int, Grid]]:
    """Return (first token after `start`, features) of the images of a sequence [1, S] that begin in [start, end)."""
    return [(image.first - start, image.grid) for image in batch.images if start <= image.first < end]


def decode_with_images(
    token_ids: list[int], masked: list[bool], decoder: Decoder, images: list[tuple[int, Grid]]
) -> list[ShownChunk]:
    """Decode tokens; an image is one chunk that says what it is. images: first token and features of each, in order."""
    chunks, position = [], 0
    for first, grid in images:
        chunks += decode_chunks(token_ids[position:first], masked[position:first], decoder)
        position = min(first + count_image_tokens(grid), len(token_ids))
        name = f"[image {grid[0]} x {grid[1]}]"
        chunks.append(ShownChunk(name, position - first, is_masked=False, is_special=True))
    return chunks + decode_chunks(token_ids[position:], masked[position:], decoder)


def decode_chunks(token_ids: list[int], masked: list[bool], decoder: Decoder) -> list[ShownChunk]:
    """Decode tokens; a character of which only some tokens are masked becomes one replacement mark per token."""
    chunks, first = [], 0
    for chunk in decoder.decode(token_ids):
        chunks += _cut(chunk, token_ids[first : first + chunk.num_tokens], masked[first:], decoder)
        first += chunk.num_tokens
    return list(_join(chunks))


def _cut(chunk: DecodedChunk, token_ids: list[int], masked: list[bool], decoder: Decoder) -> list[ShownChunk]:
    if len(set(masked[: chunk.num_tokens])) == 1:
        return [ShownChunk(chunk.text, chunk.num_tokens, masked[0], chunk.is_special)]
    return [ShownChunk(decoder.name(token), 1, is_masked) for token, is_masked in zip(token_ids, masked, strict=False)]


def _join(chunks: list[ShownChunk]) -> Iterator[ShownChunk]:
    """Yield the chunks, neighbours that look alike as one."""
    for (is_masked, is_special), group in groupby(chunks, key=lambda chunk: (chunk.is_masked, chunk.is_special)):
        if is_special:
            yield from group
        else:
            joined = list(group)
            text, num_tokens = "".join(chunk.text for chunk in joined), sum(chunk.num_tokens for chunk in joined)
            yield ShownChunk(text, num_tokens, is_masked)
