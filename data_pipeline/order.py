"""Compute the order of samples: which source a global sample index means, and which of its sequences. No data is read.

permute() is a seeded random order of any number of items that costs no memory: position -> item in constant time. A
balanced Feistel network permutes the integers of 2h bits for any round function (Luby and Rackoff, 1988). Choosing h so
that 2^(2h) >= size and applying the network again while the result is outside [0, size) ("cycle walking", Black and
Rogaway, 2002) makes it a permutation of [0, size); as 2^(2h) < 4 * size, fewer than four passes are expected.

BlendOrder says which source comes when. Shares are whole numbers of slots in a round of ROUND_SLOTS samples. Every
round has its own seeded order of the slots, and the slots of a source take its sequences one after the other. So an
index is located in constant time from the order of its round alone. Whenever a run stops, each source has been read up
to some sequence without gaps; at the end of every round each source has had exactly its share.

A run whose blend is changed gets a new order that begins at the sample it has reached, where every source continues at
its own next sequence. The order is saved with each checkpoint; nothing else needs to be known of former blends.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from conf.system.errors import UserError

ROUNDS = 6
WORD = (1 << 64) - 1


def mix64[T: (int, np.ndarray)](value: T) -> T:
    """Mix a 64-bit integer, or every element of an array of uint64, by a bijection that looks random.

    This is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    value = (value + 0x9E3779B97F4A7C15) & WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)


def derive_key(*parts: int) -> int:
    """Derive a 64-bit key from integers; the order of the parts matters."""
    key = 0
    for part in parts:
        key = mix64(key ^ mix64(part & WORD))
    return key


def permute(index: int, size: int, key: int) -> int:
    """Return the item at position `index` (0 <= index < size) in the random order of `size` items that `key` names."""
    assert 0 <= index < size
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    item = _feistel(index, half_bits, key)
    while item >= size:
        item = _feistel(item, half_bits, key)
    return item


def _feistel(value: int, half_bits: int, key: int) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for round_number in range(ROUNDS):
        left, right = right, left ^ (mix64(key ^ mix64((right << 8) | round_number)) & mask)
    return (left << half_bits) | right


ROUND_SLOTS = 1 << 16
BLEND_KEY = 0xB1E7D  # keeps the order of sources independent of the order within them
MAX_CACHED_ROUNDS = 4  # of 1 MB each: training and held-out data, and prefetching across the end of a round


@dataclass(frozen=True)
class SourceOrder:
    """Describes a source that is or was in the blend.

    sha256: of its content, by which it is recognised. name: the latest one, for messages.
    slots: of a round; 0 for a source that was taken out. sequences: of one of its epochs.
    read: sequences read before the order's first sample.
    """

    sha256: str
    name: str
    slots: int
    sequences: int
    read: int = 0

    @property
    def share(self) -> float:
        """Return the share of the samples that come from here, 0..1."""
        return self.slots / ROUND_SLOTS

    def continue_at(self, read: int, sequences: int) -> int:
        """Return the next sequence after `read` when an epoch had `sequences`.

        In another form (length, packing) an epoch has another number of sequences: the share of it that was read stays
        the same, rounded up to a whole sequence.
        """
        return -(-read * self.sequences // sequences)


@dataclass(frozen=True)
class BlendOrder:
    """Order the global samples from `first_sample` on. The slots of the sources sum to a round."""

    seed: int
    sources: tuple[SourceOrder, ...]
    first_sample: int = 0

    def locate(self, sample_index: int) -> tuple[int, int]:
        """Return a sample's source, as index of `sources`, and the sequence within it. sample_index >= first_sample."""
        assert sample_index >= self.first_sample
        source, rank, round_number = self._place(sample_index - self.first_sample)
        order = self.sources[source]
        return source, order.read + round_number * order.slots + rank

    def count_read(self, samples_seen: int) -> tuple[int, ...]:
        """Return the sequences read of every source once the run has read `samples_seen` (>= first_sample) samples."""
        assert samples_seen >= self.first_sample
        round_number, position = divmod(samples_seen - self.first_sample, ROUND_SLOTS)
        part = np.bincount(self._round(round_number).sources[:position], minlength=len(self.sources))
        return tuple(
            source.read + round_number * source.slots + int(count)
            for source, count in zip(self.sources, part, strict=True)
        )

    def follow(self, former: "BlendOrder", samples_seen: int) -> "BlendOrder":
        """Return this order (of a fresh run) as the continuation of a run that read `samples_seen` samples in `former`.

        That is `former` itself if nothing changed. Otherwise a new order begins, in which each source continues at its
        own next sequence; sources that are left out are remembered, in case they come back.
        """
        if self.means_the_same_as(former):
            return replace(former, sources=_with_names(former.sources, self.sources))
        read = dict(zip((key for key, _ in _keyed(former.sources)), former.count_read(samples_seen), strict=True))
        theirs, ours = dict(_keyed(former.sources)), dict(_keyed(self.sources))
        mine = [
            replace(source, read=source.continue_at(read[key], theirs[key].sequences)) if key in theirs else source
            for key, source in ours.items()
        ]
        gone = [replace(source, slots=0, read=read[key]) for key, source in theirs.items() if key not in ours]
        return BlendOrder(self.seed, (*mine, *gone), samples_seen)

    @cached_property
    def live(self) -> tuple[SourceOrder, ...]:
        """Return the sources in the blend now; they come first in `sources`."""
        return tuple(source for source in self.sources if source.slots)

    def to_dict(self) -> dict[str, Any]:
        """Return the order as a checkpoint's manifest holds it."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any], where: str) -> "BlendOrder":
        """Return the order of to_dict's `values`, read from `where`. Raises UserError if they are something else."""
        try:
            sources = tuple(SourceOrder(**source) for source in values["sources"])
            return BlendOrder(**{**values, "sources": sources})
        except (KeyError, TypeError) as error:
            raise UserError(f"{where} does not say where its data continue ({error}): use another step") from None

    def means_the_same_as(self, former: "BlendOrder") -> bool:
        """Return whether seed, sources, shares and the sizes of epochs are those of `former`."""
        mine, theirs = (
            [(source.sha256, source.slots, source.sequences) for source in order.live] for order in (self, former)
        )
        return self.seed == former.seed and mine == theirs

    def _place(self, offset: int) -> tuple[int, int, int]:
        """Return source, its rank within the round, and the round of the sample `offset` samples after the first."""
        if len(self.live) == 1:
            return 0, offset, 0
        round_number, position = divmod(offset, ROUND_SLOTS)
        order = self._round(round_number)
        return int(order.sources[position]), int(order.ranks[position]), round_number

    def _round(self, round_number: int) -> "RoundOrder":
        # first_sample is part of the key: a blend that is changed often must not always begin with the same slots.
        key = derive_key(BLEND_KEY, self.seed, self.first_sample + round_number)
        return _order_round(key, tuple(source.slots for source in self.sources))


@dataclass(frozen=True)
class RoundOrder:
    """Holds a round. sources: [ROUND_SLOTS] source of every sample. ranks: its samples of that source before it."""

    sources: np.ndarray
    ranks: np.ndarray


@lru_cache(maxsize=MAX_CACHED_ROUNDS)
def _order_round(key: int, slots: tuple[int, ...]) -> RoundOrder:
    keys = mix64(np.arange(ROUND_SLOTS, dtype=np.uint64) ^ np.uint64(key))
    sources = np.repeat(np.arange(len(slots)), slots)[np.argsort(keys)]
    ranks = np.empty(ROUND_SLOTS, dtype=np.int64)
    for source, count in enumerate(slots):
        ranks[sources == source] = np.arange(count)
    return RoundOrder(sources, ranks)


def _keyed(sources: Iterable[SourceOrder]) -> list[tuple[tuple[str, int], SourceOrder]]:
    """Return sources with their keys: content, and which copy of it, as a blend may hold copies."""
    copies: Counter[str] = Counter()
    keyed = []
    for source in sources:
        keyed.append(((source.sha256, copies[source.sha256]), source))
        copies[source.sha256] += 1
    return keyed


def _with_names(sources: tuple[SourceOrder, ...], named: tuple[SourceOrder, ...]) -> tuple[SourceOrder, ...]:
    """Return `sources` under the names of `named`, which are the first of them."""
    renamed = (replace(source, name=other.name) for source, other in zip(sources, named, strict=False))
    return (*renamed, *sources[len(named) :])
