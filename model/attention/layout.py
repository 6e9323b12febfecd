"""Who sees whom.

Shapes: B batch, S clean length, R rows: S (AR) or 2S (joint: the noisy half, then the clean half).
Definition (arXiv 2503.09573 and the released training code): a noisy row sees its own noisy block, both directions,
and all strictly earlier clean blocks; a clean row sees clean rows causally; clean never sees noisy. Nothing is seen
across documents; padding (document -1) sees only padding. Tokens that only complete a block are part of it in the noisy
half and padding in the clean one, for no text comes after them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """document_ids, block_ids, position_ids [B, S] and block_padding [B, S] bool, as in data_pipeline's Batch.

    doubled: rows are [noisy | clean] instead of clean alone.
    """

    document_ids: Tensor
    block_ids: Tensor
    position_ids: Tensor
    block_padding: Tensor
    doubled: bool

    @property
    def sequence_length(self) -> int:
        """S."""
        return self.position_ids.shape[1]

    @property
    def clean_document_ids(self) -> Tensor:
        """Document of each clean row [B, S]; -1 where the row is padding or only completes a block."""
        return torch.where(self.block_padding, -1, self.document_ids)

    def fields(self) -> tuple[Tensor, ...]:
        """document_ids, block_ids, position_ids, block_padding."""
        return self.document_ids, self.block_ids, self.position_ids, self.block_padding

    def to(self, device: torch.device) -> "SequenceLayout":
        """The same layout on another device."""
        return SequenceLayout(*(field.to(device) for field in self.fields()), doubled=self.doubled)

    def row_positions(self) -> Tensor:
        """In-half position of every row [B, R]."""
        return torch.cat([self.position_ids, self.position_ids], dim=1) if self.doubled else self.position_ids

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


def count_seen_rows(layout: SequenceLayout) -> Tensor:
    """How many rows each row sees [B, R]: the row sums of the dense mask, with 0 for padding, without the mask."""
    is_text = layout.clean_document_ids >= 0
    clean = torch.where(is_text, layout.position_ids + 1, 0)
    if not layout.doubled:
        return clean
    rows_of_documents = (layout.document_ids >= 0).cumsum(dim=1)
    starts, ends = compute_block_starts(layout.block_ids), compute_block_ends(layout.block_ids)
    own_block = rows_of_documents.gather(1, ends - 1) - torch.where(
        starts > 0, rows_of_documents.gather(1, (starts - 1).clamp(min=0)), 0
    )
    earlier_blocks = layout.position_ids.gather(1, starts)
    return torch.cat([torch.where(layout.document_ids >= 0, own_block + earlier_blocks, 0), clean], dim=1)


def compute_dense_mask(layout: SequenceLayout) -> Tensor:
    """The definition, spelled out: mask[b, q, k] is True where row q sees row k. [B, R, R] bool.

    For reference and for tests; training never builds it.
    """
    index = torch.arange(layout.sequence_length, device=layout.position_ids.device)
    if not layout.doubled:
        return _same(layout.clean_document_ids, layout.clean_document_ids) & (index[:, None] >= index)
    documents = torch.cat([layout.document_ids, layout.clean_document_ids], dim=1)
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
