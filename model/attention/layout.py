"""Who sees whom.

Shapes: B batch, S clean length, R rows: S (AR) or 2S (joint: the noisy half, then the clean half).
Definition (arXiv 2503.09573 and the released training code): a noisy row sees its own noisy block, both directions,
and all strictly earlier clean blocks; a clean row sees clean rows causally; clean never sees noisy. Nothing is seen
across documents; filler (document -1) sees only filler.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """document_ids, block_ids, positions [B, S]; doubled: rows are [noisy | clean] instead of clean alone."""

    document_ids: Tensor
    block_ids: Tensor
    positions: Tensor
    doubled: bool

    @property
    def sequence_length(self) -> int:
        """S."""
        return self.positions.shape[1]

    def fields(self) -> tuple[Tensor, Tensor, Tensor]:
        """document_ids, block_ids, positions."""
        return self.document_ids, self.block_ids, self.positions

    def to(self, device: torch.device) -> "SequenceLayout":
        """The same layout on another device."""
        return SequenceLayout(*(field.to(device) for field in self.fields()), doubled=self.doubled)

    def row_positions(self) -> Tensor:
        """In-half position of every row [B, R]."""
        return torch.cat([self.positions, self.positions], dim=1) if self.doubled else self.positions

    def without_repeats(self) -> "SequenceLayout":
        """The same layout with B = 1 if all sequences of the batch are laid out alike."""
        if any(not torch.equal(field, field[:1].expand_as(field)) for field in self.fields()):
            return self
        return SequenceLayout(*(field[:1] for field in self.fields()), doubled=self.doubled)


def compute_block_starts(block_ids: Tensor) -> Tensor:
    """Index of the first row of each row's block [B, S]; blocks are numbered in sequence order."""
    return torch.searchsorted(block_ids.contiguous(), block_ids.contiguous(), side="left")


def compute_block_ends(block_ids: Tensor) -> Tensor:
    """Index after the last row of each row's block [B, S]."""
    return torch.searchsorted(block_ids.contiguous(), block_ids.contiguous(), side="right")


def compute_dense_mask(layout: SequenceLayout) -> Tensor:
    """The definition, spelled out: mask[b, q, k] is True where row q sees row k. [B, R, R] bool.

    For reference and for tests; training never builds it.
    """
    index = torch.arange(layout.sequence_length, device=layout.positions.device)
    if not layout.doubled:
        return _same(layout.document_ids, layout.document_ids) & (index[:, None] >= index)
    documents = torch.cat([layout.document_ids, layout.document_ids], dim=1)
    blocks = torch.cat([layout.block_ids, layout.block_ids], dim=1)
    index = torch.cat([index, index])
    is_noisy = torch.arange(len(index), device=index.device) < layout.sequence_length

    noisy_to_noisy = is_noisy[:, None] & is_noisy
    noisy_to_clean = is_noisy[:, None] & ~is_noisy
    clean_to_clean = ~is_noisy[:, None] & ~is_noisy
    own_block = noisy_to_noisy & _same(blocks, blocks)
    earlier_blocks = noisy_to_clean & (blocks[:, None, :] < blocks[:, :, None])
    causal = clean_to_clean & (index[:, None] >= index)
    return (own_block | earlier_blocks | causal) & _same(documents, documents)


def _same(queries: Tensor, keys: Tensor) -> Tensor:
    return queries[:, :, None] == keys[:, None, :]
