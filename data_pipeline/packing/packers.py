"""Which documents make up which sequence of a shard.

Texts are one stream, cut into sequences wherever it must be: the entry of a sequence is the place of its first token.
Chats stay whole: every window of neighbouring chats is packed on its own, longest first into the first sequence with
room (first-fit decreasing); the entry of a window is the number of sequences before it. So a sequence is found in
constant time, and an entry costs 8 bytes per sequence of text, and less per sequence of chats.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Protocol

import numpy as np

from conf.schema import DocumentKind, OverlongChat
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.sequence import Segments, count_positions
from data_pipeline.storage.tokens import Shard

DOCUMENTS_PER_PIECE = 1 << 20  # bounds memory while an index is built
CHATS_PER_WINDOW = 4096  # the last, half-empty sequence of a window costs 1% where 80 chats fill a sequence
WINDOWS_KEPT = 64


@dataclass(frozen=True)
class PackingCounts:
    """What one pass over the data holds.

    sequences; documents: those that are used. tokens: of them, scored_tokens: those of answers and texts.
    block_padding_tokens, padding_tokens: without text; tokens and these two add up to sequences * S.
    truncated_chats, truncated_tokens: chats cut to a sequence, and what was cut off.
    dropped_chats, dropped_tokens: chats left out. tokens + truncated_tokens + dropped_tokens = tokens on disk.
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

    def __add__(self, other: "PackingCounts") -> "PackingCounts":
        names = [item.name for item in fields(PackingCounts)]
        return PackingCounts(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True)
class PackingIndex:
    """Where the sequences of a dataset are.

    entries: int32 [n, 2] of all shards, end to end, memory-mapped. entry_starts: [shards + 1] where each shard's lie.
    sequence_starts: [shards + 1] number of each shard's first sequence. counts: of the whole dataset.
    """

    entries: np.ndarray
    entry_starts: list[int]
    sequence_starts: list[int]
    counts: PackingCounts

    def find(self, sequence: int) -> tuple[int, np.ndarray, int]:
        """Shard number, entries of that shard, and number within the shard, of a sequence of the dataset."""
        shard = int(np.searchsorted(self.sequence_starts, sequence, side="right")) - 1
        entries = self.entries[self.entry_starts[shard] : self.entry_starts[shard + 1]]
        return shard, entries, sequence - self.sequence_starts[shard]


class Packer(Protocol):
    """How the documents of a shard become sequences of `form.sequence_length` rows."""

    @property
    def form(self) -> SequenceForm:
        """Of the sequences."""
        ...

    def build_entries(self, shard: Shard) -> tuple[np.ndarray, PackingCounts]:
        """Entries of a shard, int32 [n, 2], and what its sequences hold."""
        ...

    def read(self, shard: Shard, entries: np.ndarray, sequence: int) -> Segments:
        """Segments of sequence number `sequence` of a shard."""
        ...


def build_packer(kind: DocumentKind, form: SequenceForm) -> Packer:
    """Packer of a kind of documents."""
    return TextPacker(form) if kind is DocumentKind.text else ChatPacker(form)


@dataclass(frozen=True)
class TextPacker:
    """Entry: (document, token of it) of the first token of a sequence."""

    form: SequenceForm

    def build_entries(self, shard: Shard) -> tuple[np.ndarray, PackingCounts]:
        """One entry per sequence, the last one of which is filled up with padding."""
        entries, row = [], 0
        for first in range(0, shard.num_documents, DOCUMENTS_PER_PIECE):
            lengths = shard.document_lengths(first, min(first + DOCUMENTS_PER_PIECE, shard.num_documents))
            ends = row + np.cumsum(count_positions(lengths, self._alignment))
            starts = ends - count_positions(lengths, self._alignment)
            wanted = np.arange(-(-row // self._length), -(-int(ends[-1]) // self._length)) * self._length
            document = np.searchsorted(ends, wanted, side="right")
            entries.append(_to_entries(first + document, wanted - starts[document]))
            row = int(ends[-1])
        sequences = -(-row // self._length)
        end = -(-row // self.form.alignment) * self.form.alignment  # the stream's own last block is completed too
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
        """The stream from the entry on: the rest of one document, whole ones, and the beginning of another."""
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
        """Tokens that each document from `document` on has within the sequence."""
        piece, lengths = 16, np.zeros(0, dtype=np.int64)
        while True:
            lengths = shard.document_lengths(document, min(document + piece, shard.num_documents))
            lengths[0] -= offset
            ends = np.cumsum(count_positions(lengths, self._alignment))
            if ends[-1] >= self._length or document + piece >= shard.num_documents:
                break
            piece *= 4
        used = int(np.searchsorted(ends, self._length)) + 1
        lengths, starts = lengths[:used], (ends - count_positions(lengths, self._alignment))[:used]
        return np.minimum(lengths, self._length - starts)


@dataclass(frozen=True)
class ChatPacker:
    """Entry: (0, sequences before a window), and a last entry with the sequences of the shard."""

    form: SequenceForm

    def build_entries(self, shard: Shard) -> tuple[np.ndarray, PackingCounts]:
        """One entry per window and one more."""
        before, counts = [0], PackingCounts()
        for first in range(0, shard.num_documents, CHATS_PER_WINDOW):
            window = _pack_window(shard, first, self.form)
            before.append(before[-1] + len(window.sequences))
            counts += window.counts
        return _to_entries(np.zeros_like(before), np.array(before)), counts

    def read(self, shard: Shard, entries: np.ndarray, sequence: int) -> Segments:
        """The chats of a sequence, in the order they were packed, cut where the sequence ends."""
        window = int(np.searchsorted(entries[:, 1], sequence, side="right")) - 1
        packed = _pack_window(shard, window * CHATS_PER_WINDOW, self.form)
        chats = packed.sequences[sequence - int(entries[window, 1])]
        parts = list(self._read_chats(shard, chats))
        return Segments(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _read_chats(self, shard: Shard, chats: list[int]) -> Iterator[tuple[np.ndarray, ...]]:
        for number, chat in enumerate(chats):
            bounds = shard.segment_bounds(chat, chat + 1)
            kept = _cut_chats(shard.segment_lengths(bounds[0], bounds[1]), bounds, self.form)
            kept = kept[kept > 0]
            # Only the last kept segment can be shorter than it is on disk, so the tokens are one piece.
            tokens = shard.read(chat, 0, int(kept.sum()))
            yield tokens, kept, np.full(len(kept), number), np.arange(len(kept)) % 2 == 0


@dataclass(frozen=True)
class Window:
    """Packed chats. sequences: the chats (document numbers) of each sequence."""

    sequences: list[list[int]]
    counts: PackingCounts


@lru_cache(maxsize=WINDOWS_KEPT)
def _pack_window(shard: Shard, first: int, form: SequenceForm) -> Window:
    """Packs chats [first, first + CHATS_PER_WINDOW)."""
    bounds = shard.segment_bounds(first, min(first + CHATS_PER_WINDOW, shard.num_documents))
    lengths = shard.segment_lengths(bounds[0], bounds[-1]).astype(np.int64)
    chat_starts = bounds[:-1] - bounds[0]
    kept = _cut_chats(lengths, bounds, form)
    tokens, kept_tokens = np.add.reduceat(lengths, chat_starts), np.add.reduceat(kept, chat_starts)
    is_used = kept_tokens > 0
    if form.overlong_chats is OverlongChat.drop:
        is_used &= kept_tokens == tokens
    rows = np.add.reduceat(count_positions(kept, form.alignment), chat_starts)
    sequences = _first_fit_decreasing(rows, is_used, form.sequence_length)

    answers = np.where(np.repeat(is_used, np.diff(bounds)), kept, 0)[1::2]
    block_padding_tokens = int((count_positions(answers, form.alignment) - answers).sum())
    num_tokens, num_rows = int(kept_tokens[is_used].sum()), len(sequences) * form.sequence_length
    counts = PackingCounts(
        sequences=len(sequences),
        documents=int(is_used.sum()),
        tokens=num_tokens,
        scored_tokens=int(answers.sum()),
        block_padding_tokens=block_padding_tokens,
        padding_tokens=num_rows - num_tokens - block_padding_tokens,
        truncated_chats=int((is_used & (kept_tokens < tokens)).sum()),
        truncated_tokens=int((tokens - kept_tokens)[is_used].sum()),
        dropped_chats=int((~is_used).sum()),
        dropped_tokens=int(tokens[~is_used].sum()),
    )
    return Window([[first + chat for chat in chats] for chats in sequences], counts)


def _to_entries(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int32 [n, 2]; a shard has fewer than 2^31 documents and sequences."""
    entries = np.stack([first, second], axis=1)
    assert not len(entries) or entries.max() < 1 << 31
    return entries.astype(np.int32)


def _cut_chats(lengths: np.ndarray, bounds: np.ndarray, form: SequenceForm) -> np.ndarray:
    """Tokens kept of each segment (context, answer, context, ...) of chats that each start a sequence; int64.

    What comes after the last answer token that fits is cut: nothing is kept of a chat whose first answer does not.
    bounds: [n + 1] first segments of the chats.
    """
    rows = count_positions(lengths, form.alignment)
    rows_before = np.cumsum(rows) - rows
    first_rows = np.repeat(rows_before[bounds[:-1] - bounds[0]], np.diff(bounds))
    room = form.sequence_length - (rows_before - first_rows)
    kept = np.minimum(lengths.astype(np.int64), np.maximum(room, 0)).reshape(-1, 2)
    kept[kept[:, 1] == 0, 0] = 0  # a context without its answer
    return kept.ravel()


def _first_fit_decreasing(sizes: np.ndarray, is_used: np.ndarray, capacity: int) -> list[list[int]]:
    """The used items in as few bins as first-fit decreasing finds; equal sizes in the order they come."""
    bins: list[list[int]] = []
    room = np.full(len(sizes), capacity)
    for item in np.argsort(-sizes, kind="stable").tolist():
        if is_used[item]:
            place = int((room[: len(bins) + 1] >= sizes[item]).argmax())  # a bin that is not begun has room
            if place == len(bins):
                bins.append([])
            bins[place].append(item)
            room[place] -= sizes[item]
    return bins
