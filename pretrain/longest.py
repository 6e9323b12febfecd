"""Sequences of the largest cost: each one document from its first row to its last, every token scored."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from data_pipeline.batch import Batch
from data_pipeline.dataset import Blend


@dataclass(frozen=True)
class LongestBlend:
    """The tokens of `blend`, laid out so. It is for trying out memory and time, never for training."""

    blend: Blend

    def build_batch(self, sample_indices: Sequence[int]) -> Batch:
        """Batch [B, S]."""
        batch = self.blend.build_batch(sample_indices)
        block_size = next(iter(self.blend.sources.values())).form.block_size
        position_ids = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens).contiguous()
        return replace(
            batch,
            document_ids=torch.zeros_like(batch.document_ids),
            block_ids=position_ids // block_size,
            position_ids=position_ids,
            loss_mask=torch.ones_like(batch.loss_mask),
            block_padding=torch.zeros_like(batch.block_padding),
        )
