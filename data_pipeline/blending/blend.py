"""Several sources as one stream of training sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conf.schema import SourceConfig
from conf.system.errors import UserError
from data_pipeline.batch import Batch
from data_pipeline.blending import blend_order
from data_pipeline.blending.blend_order import BlendOrder, SourceOrder
from data_pipeline.dataset import TokenDataset
from data_pipeline.packing.sequence import stack_rows

ORDER_VERSION = 1  # of everything that maps a sample index to tokens: blend, permutation, packing


@dataclass(frozen=True)
class Blend:
    """sources: by name, in the order of the (first) sources of `order`, which says when each is read."""

    sources: dict[str, TokenDataset]
    order: BlendOrder

    def locate(self, sample_index: int) -> tuple[str, int]:
        """Name of the source of a global sample index, and the number of the sequence within that source."""
        source, number = self.order.locate(sample_index)
        return self.order.sources[source].name, number

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
        unread = (int(max(0, source.sequences - source.read) / source.share) for source in self.order.live)
        return self.order.first_sample + min(unread)

    def shares(self) -> dict[str, float]:
        """Share of every source, 0..1."""
        return {source.name: source.share for source in self.order.live}

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How often each source is read in the first `num_samples` samples (expected; exact at the end of a round)."""
        ahead = num_samples - self.order.first_sample
        return {source.name: (source.read + ahead * source.share) / source.sequences for source in self.order.live}

    def fingerprint(self) -> dict[str, Any]:
        """What decides which tokens a sequence of a source holds, for checkpoints. Which are read says `order`."""
        form = next(iter(self.sources.values())).form
        return {
            "order": ORDER_VERSION,
            "seed": self.order.seed,
            "sequence_length": form.sequence_length,
            "alignment": form.alignment,
            "isolate_documents": form.isolate_documents,
            "overlong_chats": form.overlong_chats.value,
        }


def build_blend(sources: dict[str, TokenDataset], configs: dict[str, SourceConfig], seed: int) -> Blend:
    """Blend of `sources` with the weights or token budgets that `configs` gives them (the same names), from sample 0.

    The order does not depend on names, nor on which source is named first.
    Raises UserError for a source whose share is less than one slot.
    """
    names = sorted(sources, key=lambda name: (sources[name].stored.sha256, name))
    weights = np.array([float(configs[name].weight or configs[name].tokens or 1) for name in names])
    slots = _round_to_slots(weights / weights.sum())
    for name, count in zip(names, slots, strict=True):
        if not count:
            raise UserError(
                f"the source {name} has a share below 1/{blend_order.ROUND_SLOTS} of the blend: raise its weight or "
                "leave it out."
            )
    orders = (
        SourceOrder(sources[name].stored.sha256, name, int(count), sources[name].num_sequences)
        for name, count in zip(names, slots, strict=True)
    )
    return Blend({name: sources[name] for name in names}, BlendOrder(seed, tuple(orders)))


def _round_to_slots(shares: np.ndarray) -> np.ndarray:
    """Whole slots that sum to a round; the largest remainders are rounded up."""
    exact = shares * blend_order.ROUND_SLOTS
    slots = np.floor(exact).astype(np.int64)
    missing = blend_order.ROUND_SLOTS - int(slots.sum())
    slots[np.argsort(slots - exact, kind="stable")[:missing]] += 1
    return slots
