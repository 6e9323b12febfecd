"""How long documents are: exact, in memory that does not grow with their number."""

from dataclasses import dataclass

import numpy as np

from conf.schema import DocumentKind
from data_pipeline.storage.stored import StoredTokens

DOCUMENTS_PER_PIECE = 1 << 18


@dataclass(frozen=True)
class LengthCounts:
    """lengths: [n] distinct lengths in tokens, ascending. counts: [n] how often each occurs.

    n distinct lengths need n^2 / 2 tokens, so those of 10^12 tokens fit in 25 MB.
    """

    lengths: np.ndarray
    counts: np.ndarray

    @property
    def total(self) -> int:
        """Number of lengths."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """In tokens."""
        return float(self.lengths @ self.counts) / self.total

    def quantile(self, share: float) -> int:
        """Smallest length that at least `share` (0..1) of all are not longer than."""
        return int(self.lengths[np.searchsorted(np.cumsum(self.counts), share * self.total)])

    def add(self, lengths: np.ndarray) -> "LengthCounts":
        """With more lengths."""
        new, counts = np.unique(lengths, return_counts=True)
        both, places = np.unique(np.concatenate([self.lengths, new]), return_inverse=True)
        totals = np.zeros(len(both), dtype=np.int64)
        np.add.at(totals, places, np.concatenate([self.counts, counts]))
        return LengthCounts(both, totals)


def count_lengths(stored: StoredTokens) -> dict[str, LengthCounts]:
    """Lengths of `document`s, and in chats of `context`s and `answer`s."""
    names = ("document", "context", "answer") if stored.kind is DocumentKind.chat else ("document",)
    none = np.zeros(0, dtype=np.int64)
    counts = {name: LengthCounts(none, none) for name in names}
    for number in range(stored.num_shards):
        shard = stored.open_shard(number)
        for first in range(0, shard.num_documents, DOCUMENTS_PER_PIECE):
            end = min(first + DOCUMENTS_PER_PIECE, shard.num_documents)
            pieces = [shard.document_lengths(first, end)]
            if stored.kind is DocumentKind.chat:
                bounds = shard.segment_bounds(first, end)
                segments = shard.segment_lengths(bounds[0], bounds[-1])
                pieces += [segments[::2], segments[1::2]]
            counts = {name: counts[name].add(piece) for name, piece in zip(names, pieces, strict=True)}
    return counts
