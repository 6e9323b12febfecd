"""Decide which documents make up which sequence of a shard.

Texts are one stream, cut into sequences wherever it must be: the entry of a sequence is the place of its first token.
Chats stay whole: every window of neighbouring chats is packed on its own, longest first into the first sequence with
room (first-fit decreasing); the entry of a window is the number of sequences before it. So a sequence is found in
constant time. An entry takes 8 bytes: one per sequence of text, one per window of chats.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Protocol

import numpy as np

from conf.schema import DocumentKind, OverlongChat
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.sequence import Segments, count_positions
from data_pipeline.storage.references import REFERENCE, count_tokens_of_images
from data_pipeline.storage.tokens import Shard, open_shard

DOCUMENTS_PER_CHUNK = 1 << 20  # bounds memory while an index is built
CHATS_PER_WINDOW = 4096  # the last, half-empty sequence of a window costs 1% where 80 chats fill a sequence
MAX_CACHED_WINDOWS = 64


@dataclass(frozen=True)
class PackingCounts:
    """Counts what one pass over the data holds.

    sequences; documents: those that are used. tokens: of them, scored_tokens: those of responses and texts.
    block_padding_tokens, padding_tokens: positions without text; tokens and these two add up to sequences * S.
    truncated_chats, truncated_tokens: chats cut to a sequence, and what was cut off.
    dropped_chats, dropped_tokens: chats left out. tokens + truncated_tokens + dropped_tokens = tokens on disk.
    images; image_tokens: of tokens, those that stand for images.
    """

    sequences: int = 0
    documents: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    block_padding_tokens: int = 0
    padding_tokens: int = 0
    truncated_chats: int = 0
    truncated_tokens: int = 0
    dropped_chats: int = 0
    dropped_tokens: int = 0
    images: int = 0
    image_tokens: int = 0

    def __add__(self, other: "PackingCounts") -> "PackingCounts":
        names = [item.name for item in fields(PackingCounts)]
        return PackingCounts(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True)
class PackingIndex:
    """Says where the sequences of a dataset are.

    entries: int32 [n, 2] of all shards, end to end, memory-mapped. entry_starts: [shards + 1] where each shard's lie.
    sequence_starts: [shards + 1] number of each shard's first sequence. counts: of the whole dataset.
    """

    entries: np.ndarray
    entry_starts: list[int]
    sequence_starts: list[int]
    counts: PackingCounts

    def find(self, sequence: int) -> tuple[int, np.ndarray, int]:
        """Return the shard that holds a sequence of the dataset, its entries, and the sequence's number within it."""
        shard = int(np.searchsorted(self.sequence_starts, sequence, side="right")) - 1
        entries = self.entries[self.entry_starts[shard] : self.entry_starts[shard + 1]]
        return shard, entries, sequence - self.sequence_starts[shard]


class Packer(Protocol):
    """Makes sequences of `form.sequence_length` positions of the documents of a shard."""

    @property
    def form(self) -> SequenceForm:
        """Return the form of the sequences."""
        ...

    def build_entries(self, shard: Shard) -> tuple[np.ndarray, PackingCounts]:
        """Return the entries of a shard, int32 [n, 2], and what its sequences hold."""
        ...

    def read(self, shard: Shard, entries: np.ndarray, sequence: int) -> Segments:
        """Return the segments of sequence number `sequence` of a shard."""
        ...


def build_packer(kind: DocumentKind, form: SequenceForm) -> Packer:
    """Build the packer of a kind of documents."""
    return TextPacker(form) if kind is DocumentKind.text else ChatPacker(form)


@dataclass(frozen=True)
class TextPacker:
    """Cuts texts into sequences. Entry: the document and the token within it that a sequence begins with."""

    form: SequenceForm

    def build_entries(self, shard: Shard) -> tuple[np.ndarray, PackingCounts]:
        """Return one entry per sequence; the last one is filled up with padding."""
        entries, position = [], 0
        for first in range(0, shard.num_documents, DOCUMENTS_PER_CHUNK):
            lengths = shard.document_lengths(first, min(first + DOCUMENTS_PER_CHUNK, shard.num_documents))
            ends = position + np.cumsum(count_positions(lengths, self._alignment))
            starts = ends - count_positions(lengths, self._alignment)
            wanted = np.arange(-(-position // self._length), -(-int(ends[-1]) // self._length)) * self._length
            document = np.searchsorted(ends, wanted, side="right")
            entries.append(_to_entries(first + document, wanted - starts[document]))
            position = int(ends[-1])
        sequences = -(-position // self._length)
        end = (
            -(-position // self.form.alignment) * self.form.alignment
        )  # block padding ends the stream's last block too
        counts = PackingCounts(
            sequences=sequences,
            documents=shard.num_documents,
            tokens=shard.num_tokens,
            scored_tokens=shard.num_tokens,
            block_padding_tokens=end - shard.num_tokens,
            padding_tokens=sequences * self._length - end,
        )
        return np.concatenate(entries), counts

    def read(self, shard: Shard, entries: np.ndarray, sequence: int) -> Segments:
        """Return the stream from the entry on: the rest of a document, whole ones, and the beginning of another."""
        document, offset = (int(value) for value in entries[sequence])
        lengths = self._lengths_from(shard, document, offset)
        tokens = shard.read(document, offset, int(lengths.sum()))
        if not self.form.isolate_documents:
            lengths = lengths.sum(keepdims=True)
        return Segments(tokens, lengths, np.arange(len(lengths)), np.zeros(len(lengths), dtype=bool))

    @property
    def _length(self) -> int:
        return self.form.sequence_length

    @property
    def _alignment(self) -> int:
        return self.form.alignment if self.form.isolate_documents else 1

    def _lengths_from(self, shard: Shard, document: int, offset: int) -> np.ndarray:
        """Return the tokens that each document from `document` on has within the sequence."""
        count, lengths = 16, np.zeros(0, dtype=np.int64)
        while True:
            lengths = shard.document_lengths(document, min(document + count, shard.num_documents))
            lengths[0] -= offset
            ends = np.cumsum(count_positions(lengths, self._alignment))
            if ends[-1] >= self._length or document + count >= shard.num_documents:
                break
            count *= 4
        used = int(np.searchsorted(ends, self._length)) + 1
        lengths, starts = lengths[:used], (ends - count_positions(lengths, self._alignment))[:used]
        return np.minimum(lengths, self._length - starts)


@dataclass(frozen=True)
class ChatPacker:
    """Packs whole chats. Entry: 0 and the sequences before a window; a last one holds the sequences of the shard.

    A chat is cut within a response alone, so an image, which is in a prompt, is used as a whole or not at all.
    """

    form: SequenceForm

    def build_entries(self, shard: Shard) -> tuple[np.ndarray, PackingCounts]:
        """Return one entry per window and one more."""
        before, counts = [0], PackingCounts()
        for first in range(0, shard.num_documents, CHATS_PER_WINDOW):
            window = _pack_window(shard.prefix, shard.num_tokens, first, self.form)
            before.append(before[-1] + len(window.sequences))
            counts += window.counts
        return _to_entries(np.zeros_like(before), np.array(before)), counts

    def read(self, shard: Shard, entries: np.ndarray, sequence: int) -> Segments:
        """Return the chats of a sequence, in the order they were packed, cut where the sequence ends."""
        window = int(np.searchsorted(entries[:, 1], sequence, side="right")) - 1
        packed = _pack_window(shard.prefix, shard.num_tokens, window * CHATS_PER_WINDOW, self.form)
        chats = packed.sequences[sequence - int(entries[window, 1])]
        parts = list(self._read_chats(shard, chats))
        images = self._list_images(shard, chats, [len(lengths) for _, lengths, *_ in parts])
        return Segments(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)), images=images)

    def _read_chats(self, shard: Shard, chats: list[int]) -> Iterator[tuple[np.ndarray, ...]]:
        for number, chat in enumerate(chats):
            bounds = shard.segment_bounds(chat, chat + 1)
            lengths = _fit_chats(shard.segment_lengths(bounds[0], bounds[1]), bounds, self.form)
            lengths = lengths[lengths > 0]
            # Only the last segment can be shorter than it is on disk, so the tokens are contiguous.
            tokens = shard.read(chat, 0, int(lengths.sum()))
            yield tokens, lengths, np.full(len(lengths), number), np.arange(len(lengths)) % 2 == 0

    def _list_images(self, shard: Shard, chats: list[int], num_segments: list[int]) -> np.ndarray | None:
        """Return the references of the images in the first `num_segments` segments of each chat, in order."""
        if shard.images is None:
            return None
        of_chats = [shard.images.read(chat, chat + 1) for chat in chats]
        return np.concatenate([r[r["segment"] < n] for r, n in zip(of_chats, num_segments, strict=True)])


@dataclass(frozen=True)
class Window:
    """Holds packed chats. sequences: the chats (document numbers) of each sequence."""

    sequences: list[list[int]]
    counts: PackingCounts


@lru_cache(maxsize=MAX_CACHED_WINDOWS)
def _pack_window(prefix: str, num_tokens: int, first: int, form: SequenceForm) -> Window:
    """Pack chats [first, first + CHATS_PER_WINDOW) of a shard.

    The shard is named, not passed: a cached window must not hold a shard open, and serves one that is opened again.
    """
    shard = open_shard(prefix, num_tokens)
    bounds = shard.segment_bounds(first, min(first + CHATS_PER_WINDOW, shard.num_documents))
    lengths = shard.segment_lengths(bounds[0], bounds[-1]).astype(np.int64)
    chat_starts = bounds[:-1] - bounds[0]
    fitting = _fit_chats(lengths, bounds, form)
    tokens, fitting_tokens = np.add.reduceat(lengths, chat_starts), np.add.reduceat(fitting, chat_starts)
    is_used = fitting_tokens > 0
    if form.overlong_chats is OverlongChat.drop:
        is_used &= fitting_tokens == tokens
    positions = np.add.reduceat(count_positions(fitting, form.alignment), chat_starts)
    sequences = _first_fit_decreasing(positions, is_used, form.sequence_length)

    responses = np.where(np.repeat(is_used, np.diff(bounds)), fitting, 0)[1::2]
    block_padding_tokens = int((count_positions(responses, form.alignment) - responses).sum())
    used_tokens = int(fitting_tokens[is_used].sum())
    images = _find_used_images(shard, first, bounds, np.where(np.repeat(is_used, np.diff(bounds)), fitting, 0))
    counts = PackingCounts(
        sequences=len(sequences),
        documents=int(is_used.sum()),
        tokens=used_tokens,
        scored_tokens=int(responses.sum()),
        block_padding_tokens=block_padding_tokens,
        padding_tokens=len(sequences) * form.sequence_length - used_tokens - block_padding_tokens,
        truncated_chats=int((is_used & (fitting_tokens < tokens)).sum()),
        truncated_tokens=int((tokens - fitting_tokens)[is_used].sum()),
        dropped_chats=int((~is_used).sum()),
        dropped_tokens=int(tokens[~is_used].sum()),
        images=len(images),
        image_tokens=int(count_tokens_of_images(images).sum()),
    )
    return Window([[first + chat for chat in chats] for chats in sequences], counts)


def _find_used_images(shard: Shard, first: int, bounds: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Return the references of the images of chats from `first` on whose prompts are used.

    bounds: [chats + 1] first segment of each chat. used: [segments] tokens used of each.
    """
    if shard.images is None:
        return np.zeros(0, REFERENCE)
    references = shard.images.read(first, first + len(bounds) - 1)
    per_chat = np.diff(shard.images.bounds(first, first + len(bounds) - 1))
    segment = np.repeat(bounds[:-1] - bounds[0], per_chat) + references["segment"]
    return references[used[segment] > 0]


def _to_entries(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return int32 [n, 2]; a shard has fewer than 2^31 documents and sequences."""
    entries = np.stack([first, second], axis=1)
    assert not len(entries) or entries.max() < 1 << 31
    return entries.astype(np.int32)


def _fit_chats(lengths: np.ndarray, bounds: np.ndarray, form: SequenceForm) -> np.ndarray:
    """Return the tokens of each segment that fit a sequence which its chat begins; int64.

    lengths: [segments] prompt, response, prompt, ... bounds: [chats + 1] first segment of each chat.
    A chat ends with the last response token that fits; nothing is left of one whose first response does not fit.
    """
    positions = count_positions(lengths, form.alignment)
    before = np.cumsum(positions) - positions
    before_chat = np.repeat(before[bounds[:-1] - bounds[0]], np.diff(bounds))
    room = form.sequence_length - (before - before_chat)
    fitting = np.minimum(lengths.astype(np.int64), np.maximum(room, 0)).reshape(-1, 2)
    fitting[fitting[:, 1] == 0, 0] = 0  # a prompt without its response
    return fitting.ravel()


def _first_fit_decreasing(sizes: np.ndarray, is_used: np.ndarray, capacity: int) -> list[list[int]]:
    """Return the used items in as few bins as first-fit decreasing finds; equal sizes in the order they come."""
    bins: list[list[int]] = []
    room = np.full(len(sizes), capacity)
    for item in np.argsort(-sizes, kind="stable").tolist():
        if is_used[item]:
            place = int((room[: len(bins) + 1] >= sizes[item]).argmax())  # an empty bin has room
            if place == len(bins):
                bins.append([])
            bins[place].append(item)
            room[place] -= sizes[item]
    return bins
