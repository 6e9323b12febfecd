"""The drafted blocks of a batch as one forward sees them: tokens, position ids, mask and targets.

Shapes: B sequences, S tokens of the longest, K blocks per sequence, N tokens of a block, its seed included.
"""

import torch
from torch import Tensor

from lora.drafter.batches import DraftBatch
from model.attention.visibility import VisibleKeys


def build_block_tokens(batch: DraftBatch, following: Tensor | int) -> Tensor:
    """Return [B, K * N]: every block's seed, and what follows it: the mask token, or a draft [B, K, N - 1]."""
    blocks, positions = batch.anchors.shape[1], batch.scored.shape[2]
    tokens = batch.tokens.new_empty(len(batch.tokens), blocks, positions + 1)
    tokens[:, :, 0] = batch.tokens.gather(1, batch.anchors)
    tokens[:, :, 1:] = following
    return tokens.flatten(1)


def build_block_position_ids(batch: DraftBatch) -> Tensor:
    """Return [B, K * N]: position ids in the sequence; those of a block begin at its anchor."""
    offsets = torch.arange(batch.scored.shape[2] + 1, device=batch.anchors.device)
    return (batch.anchors[:, :, None] + offsets).flatten(1)


def build_block_mask(batch: DraftBatch, *, causal: bool = False) -> Tensor:
    """Return [B, 1, K * N, S + K * N] bool, true where a position of a block sees a key; clean keys come first."""
    keys = find_block_keys(batch, causal=causal)
    clean = keys.mask_clean(slice(None), range(keys.num_clean))
    return torch.cat([clean, keys.mask_noisy(slice(None), range(keys.num_noisy))], dim=2)[:, None]


def find_block_keys(batch: DraftBatch, *, causal: bool = False) -> VisibleKeys:
    """Return what the positions of blocks see: their own block, and clean tokens before its seed.

    causal: of their own block only what is not after them, as verification sees a draft; else both directions.
    """
    block_size = batch.scored.shape[2] + 1
    clean_stop = batch.anchors.repeat_interleave(block_size, dim=1)
    index = torch.arange(clean_stop.shape[1], device=clean_stop.device).expand_as(clean_stop)
    block_start = index // block_size * block_size
    block_stop = index + 1 if causal else block_start + block_size
    intervals = (block_start, block_stop, torch.zeros_like(index), clean_stop)
    return VisibleKeys(
        *(table.int() for table in intervals),
        num_noisy=clean_stop.shape[1],
        num_clean=batch.tokens.shape[1],
        gaps=None,
    )


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
