"""Several sources as one stream: which source, and which of its sequences, a global sample index means.

Shares are whole numbers of slots in a round of ROUND_SLOTS samples. Every round has its own seeded order of the slots,
and the slots of a source take its sequences one after the other. So an index is located in constant time from the order
of its round alone; whenever a run stops, each source has been read up to some sequence without gaps; and at the end of
every round each source has had exactly its share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from conf.errors import UserError
from conf.schema import SourceConfig
from data_pipeline.batch import Batch
from data_pipeline.dataset import TokenDataset
from data_pipeline.permutation import derive_key, mix64
from data_pipeline.rows import stack_rows

ROUND_SLOTS = 1 << 16
BLEND_KEY = 0xB1E7D  # sets the order of sources apart from the order within them
ORDER_VERSION = 1  # of everything that maps a sample index to tokens: blend, permutation, packing
ROUNDS_KEPT = 4  # of 1 MB each: training and held-out data, and prefetching across the end of a round


@dataclass(frozen=True)
class Blend:
    """sources: by name. slots: [sources] of each in a round; they sum to ROUND_SLOTS. seed: of the order."""

    sources: dict[str, TokenDataset]
    slots: np.ndarray
    seed: int

    def locate(self, sample_index: int) -> tuple[str, int]:
        """Name of the source of a global sample index (>= 0), and the number of the sequence within that source."""
        if len(self.slots) == 1:
            return self._names[0], sample_index
        round_number, position = divmod(sample_index, ROUND_SLOTS)
        order = self._order_of_round(round_number)
        source = int(order.sources[position])
        return self._names[source], round_number * int(self.slots[source]) + int(order.ranks[position])

    def build_batch(self, sample_indices: Sequence[int]) -> Batch:
        """Batch [B, S] of the sequences at B global sample indices, on the CPU."""
        rows = []
        for sample_index in sample_indices:
            name, number = self.locate(int(sample_index))
            rows.append(self.sources[name].build_rows(number))
        return stack_rows(rows, [int(index) for index in sample_indices])

    @property
    def num_samples_without_repeats(self) -> int:
        """Samples until a source has been read once."""
        return min(int(samples) for samples in self._samples_per_epoch().values())

    def shares(self) -> dict[str, float]:
        """Share of every source, 0..1."""
        return {name: int(slots) / ROUND_SLOTS for name, slots in zip(self._names, self.slots, strict=True)}

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How often each source is read in `num_samples` samples (expected; exact at the end of a round)."""
        return {name: num_samples / samples for name, samples in self._samples_per_epoch().items()}

    def fingerprint(self) -> dict[str, Any]:
        """What decides which tokens a global sample index means, for checkpoints. Names and places of data do not."""
        form = next(iter(self.sources.values())).form
        shards = [source.stored.sha256[:16] for source in self.sources.values()]
        return {
            "order": ORDER_VERSION,
            "seed": self.seed,
            "sources": [f"{sha256} x{slots}" for sha256, slots in zip(shards, self.slots.tolist(), strict=True)],
            "sequence_length": form.sequence_length,
            "alignment": form.alignment,
            "isolate_documents": form.isolate_documents,
            "overlong_chats": form.overlong_chats.value,
        }

    def _samples_per_epoch(self) -> dict[str, float]:
        sizes = (source.num_sequences for source in self.sources.values())
        return {name: size / share for (name, share), size in zip(self.shares().items(), sizes, strict=True)}

    @cached_property
    def _names(self) -> list[str]:
        return list(self.sources)

    def _order_of_round(self, round_number: int) -> "RoundOrder":
        return _order_round(derive_key(BLEND_KEY, self.seed, round_number), tuple(self.slots.tolist()))


@dataclass(frozen=True)
class RoundOrder:
    """sources: [ROUND_SLOTS] source of every sample of a round. ranks: how many of that source came before it."""

    sources: np.ndarray
    ranks: np.ndarray


@lru_cache(maxsize=ROUNDS_KEPT)
def _order_round(key: int, slots: tuple[int, ...]) -> RoundOrder:
    keys = mix64(np.arange(ROUND_SLOTS, dtype=np.uint64) ^ np.uint64(key))
    sources = np.repeat(np.arange(len(slots)), slots)[np.argsort(keys)]
    ranks = np.empty(ROUND_SLOTS, dtype=np.int64)
    for source, count in enumerate(slots):
        ranks[sources == source] = np.arange(count)
    return RoundOrder(sources, ranks)


def build_blend(sources: dict[str, TokenDataset], configs: dict[str, SourceConfig], seed: int) -> Blend:
    """Blend of `sources` with the weights or token budgets that `configs` gives them (the same names).

    The order does not depend on names, nor on which source is named first.
    Raises UserError for a source whose share is less than one slot.
    """
    names = sorted(sources, key=lambda name: (sources[name].stored.sha256, name))
    weights = np.array([float(configs[name].weight or configs[name].tokens or 1) for name in names])
    slots = _round_to_slots(weights / weights.sum())
    for name, count in zip(names, slots, strict=True):
        if not count:
            raise UserError(
                f"the source {name} has a share below 1/{ROUND_SLOTS} of the blend: raise its weight or leave it out."
            )
    return Blend({name: sources[name] for name in names}, slots, seed)


def _round_to_slots(shares: np.ndarray) -> np.ndarray:
    """Whole slots that sum to a round; the largest remainders are rounded up."""
    exact = shares * ROUND_SLOTS
    slots = np.floor(exact).astype(np.int64)
    missing = ROUND_SLOTS - int(slots.sum())
    slots[np.argsort(slots - exact, kind="stable")[:missing]] += 1
    return slots
