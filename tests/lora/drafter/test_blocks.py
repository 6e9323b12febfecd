"""The drafted blocks of a batch as one forward sees them: tokens, position ids, targets and mask."""

import numpy as np
import torch

from lora.drafter.batches import DraftBatch, build_draft_batch
from lora.drafter.blocks import build_block_mask, build_block_position_ids, build_block_tokens, gather_targets
from lora.examples.example_set import Example

BLOCK, MASK, NUM_BLOCKS = 4, 99, 3


def build(*lengths: int) -> DraftBatch:
    """Build sequences of tokens 100, 101, ..., all but the first of which may be drafted."""
    examples = [Example(np.arange(100, 100 + length), np.arange(length) > 0) for length in lengths]
    return build_draft_batch(examples, range(len(lengths)), blocks=NUM_BLOCKS, block_size=BLOCK, seed=0)


def test_a_block_is_a_seed_and_masks_at_the_positions_after_it() -> None:
    batch = build(30)
    tokens = build_block_tokens(batch, MASK).view(NUM_BLOCKS, BLOCK)
    position_ids = build_block_position_ids(batch).view(NUM_BLOCKS, BLOCK)
    for block, anchor in enumerate(batch.anchors[0].tolist()):
        assert tokens[block].tolist() == [100 + anchor, MASK, MASK, MASK]
        assert position_ids[block].tolist() == list(range(anchor, anchor + BLOCK))
        inside = batch.scored[0, block].sum()
        expected = list(range(101 + anchor, 101 + anchor + inside))
        assert gather_targets(batch)[0, block, :inside].tolist() == expected


def test_a_position_sees_earlier_clean_tokens_and_its_own_block() -> None:
    batch = build(30, 14)
    mask = build_block_mask(batch)[:, 0]
    for sequence in range(2):
        for position in range(NUM_BLOCKS * BLOCK):
            block = position // BLOCK
            clean = [key < batch.anchors[sequence, block] for key in range(30)]
            own = [key // BLOCK == block for key in range(NUM_BLOCKS * BLOCK)]
            assert mask[sequence, position].tolist() == [*map(bool, clean), *own]


def test_a_draft_is_verified_causally() -> None:
    batch = build(30, 14)
    drafts = torch.arange(2 * NUM_BLOCKS * (BLOCK - 1)).view(2, NUM_BLOCKS, BLOCK - 1)
    tokens = build_block_tokens(batch, drafts).view(2, NUM_BLOCKS, BLOCK)
    assert torch.equal(tokens[..., 0], batch.tokens.gather(1, batch.anchors)) and torch.equal(tokens[..., 1:], drafts)
    both, causal = build_block_mask(batch), build_block_mask(batch, causal=True)
    assert torch.equal(causal[..., :30], both[..., :30])
    assert torch.equal(causal[..., 30:], both[..., 30:].tril())
