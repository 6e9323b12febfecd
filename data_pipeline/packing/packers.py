"""Decide which documents make up which sequence of a shard.

Texts are one stream, cut into sequences wherever it must be: the entry of a sequence is the place of its first token.
Chats stay whole: every window of neighbouring chats is packed on its own (windows.py); the entry of a window is the
number of sequences before it. So a sequence is found in
constant time. An entry takes 8 bytes: one per sequence of text, one per window of chats.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from conf.schema import DocumentKind
from data_pipeline.packing import windows
from data_pipeline.packing.counts import PackingCounts
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.sequence import Outline, Segments, count_positions
from data_pipeline.packing.windows import fit_chats, pack_window
from data_pipeline.storage.tokens import Shard

DOCUMENTS_PER_CHUNK = 1 << 20  # bounds memory while an index is built


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

    def outline(self, shard: Shard, entries: np.ndarray, sequence: int) -> Outline:
        """Return the outline of sequence number `sequence` of a shard; no token is read."""
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

    def outline(self, shard: Shard, entries: np.ndarray, sequence: int) -> Outline:
        """Return the outline of what read returns."""
        document, offset = (int(value) for value in entries[sequence])
        lengths = self._lengths_from(shard, document, offset)
        if not self.form.isolate_documents:
            lengths = lengths.sum(keepdims=True)
        return Outline(lengths, np.arange(len(lengths)), np.zeros(len(lengths), dtype=bool))

    def read(self, shard: Shard, entries: np.ndarray, sequence: int) -> Segments:
        """Return the stream from the entry on: the rest of a document, whole ones, and the beginning of another."""
        outline = self.outline(shard, entries, sequence)
        document, offset = (int(value) for value in entries[sequence])
        return outline.with_tokens(shard.read(document, offset, int(outline.lengths.sum())))

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
        for first in range(0, shard.num_documents, windows.CHATS_PER_WINDOW):
            window = pack_window(shard.prefix, shard.num_tokens, first, self.form)
            before.append(before[-1] + len(window.ends))
            counts += window.counts
        return _to_entries(np.zeros_like(before), np.array(before)), counts

    def outline(self, shard: Shard, entries: np.ndarray, sequence: int) -> Outline:
        """Return the outline of what read returns."""
        return self._outline(shard, self._find_chats(shard, entries, sequence))

    def read(self, shard: Shard, entries: np.ndarray, sequence: int) -> Segments:
        """Return the chats of a sequence, in the order they were packed, cut where the sequence ends."""
        chats = self._find_chats(shard, entries, sequence)
        outline = self._outline(shard, chats)
        # Only a chat's last segment can be shorter than it is on disk, so its tokens are contiguous.
        counts = np.bincount(outline.documents, outline.lengths).astype(np.int64).tolist()
        tokens = [shard.read(chat, 0, count) for chat, count in zip(chats, counts, strict=True)]
        images = self._list_images(shard, chats, np.bincount(outline.documents).tolist())
        return outline.with_tokens(np.concatenate(tokens), images)

    def _find_chats(self, shard: Shard, entries: np.ndarray, sequence: int) -> list[int]:
        window = int(np.searchsorted(entries[:, 1], sequence, side="right")) - 1
        packed = pack_window(shard.prefix, shard.num_tokens, window * windows.CHATS_PER_WINDOW, self.form)
        return packed.find(sequence - int(entries[window, 1]))

    def _outline(self, shard: Shard, chats: list[int]) -> Outline:
        parts = []
        for number, chat in enumerate(chats):
            bounds = shard.segment_bounds(chat, chat + 1)
            lengths = fit_chats(shard.segment_lengths(bounds[0], bounds[1]), bounds, self.form)
            lengths = lengths[lengths > 0]
            parts.append((lengths, np.full(len(lengths), number), np.arange(len(lengths)) % 2 == 0))
        return Outline(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _list_images(self, shard: Shard, chats: list[int], num_segments: list[int]) -> np.ndarray | None:
        """Return the references of the images in the first `num_segments` segments of each chat, in order."""
        if shard.images is None:
            return None
        of_chats = [shard.images.read(chat, chat + 1) for chat in chats]
        return np.concatenate([r[r["segment"] < n] for r, n in zip(of_chats, num_segments, strict=True)])


def _to_entries(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return int32 [n, 2]; a shard has fewer than 2^31 documents and sequences."""
    entries = np.stack([first, second], axis=1)
    assert not len(entries) or entries.max() < 1 << 31
    return entries.astype(np.int32)
