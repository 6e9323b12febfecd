"""The drafted blocks of a batch as one forward sees them: tokens, position ids, mask and targets.

Shapes: B sequences, S tokens of the longest, K blocks per sequence, N tokens of a block, its seed included.
"""

import torch
from torch import Tensor

from lora.drafter.batches import DraftBatch


def build_block_tokens(batch: DraftBatch, mask_token_id: int) -> Tensor:
    """Return [B, K * N]: every block's seed followed by masks."""
    blocks, positions = batch.anchors.shape[1], batch.scored.shape[2]
    tokens = batch.tokens.new_full((len(batch.tokens), blocks, positions + 1), mask_token_id)
    tokens[:, :, 0] = batch.tokens.gather(1, batch.anchors)
    return tokens.flatten(1)


def build_block_position_ids(batch: DraftBatch) -> Tensor:
    """Return [B, K * N]: position ids in the sequence; those of a block begin at its anchor."""
    offsets = torch.arange(batch.scored.shape[2] + 1, device=batch.anchors.device)
    return (batch.anchors[:, :, None] + offsets).flatten(1)


def build_block_mask(batch: DraftBatch) -> Tensor:
    """Return [B, 1, K * N, S + K * N] bool, true where a position of a block sees a key.

    A position sees the clean tokens before its block's seed and, in both directions, its own block.
    """
    block_size = batch.scored.shape[2] + 1
    anchors = batch.anchors.repeat_interleave(block_size, dim=1)
    clean = torch.arange(batch.tokens.shape[1], device=anchors.device) < anchors[..., None]
    block = torch.arange(anchors.shape[1], device=anchors.device) // block_size
    own = (block[:, None] == block[None]).expand(len(anchors), -1, -1)
    return torch.cat([clean, own], dim=2)[:, None]


def gather_targets(batch: DraftBatch) -> Tensor:
    """Return [B, K, N - 1]: the true tokens at the masks; any token beyond the end of a sequence."""
    indices = _find_indices(batch, first=1)
    return batch.tokens.gather(1, indices.flatten(1)).view(indices.shape)


def gather_verifier_states(clean: Tensor, batch: DraftBatch) -> Tensor:
    """Return [B, K, N - 1, hidden]: the states of `clean` [B, S, hidden] that predict each drafted position.

    The first of them is the seed's own.
    """
    sequences = torch.arange(len(clean), device=clean.device)[:, None, None]
    return clean[sequences, _find_indices(batch, first=0)]


def _find_indices(batch: DraftBatch, *, first: int) -> Tensor:
    """Return [B, K, N - 1]: indices of as many successive tokens of each block, below S; first: offset to the seed."""
    position_ids = build_block_position_ids(batch).view(*batch.anchors.shape, -1)
    return position_ids[:, :, first : first + batch.scored.shape[2]].clamp(max=batch.tokens.shape[1] - 1)
