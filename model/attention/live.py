"""Choose the noisy positions of a forward: those of live blocks, dealt to context-parallel ranks, in few lengths.

A noisy block is seen by itself alone. So a block without a masked token that may be scored (NoisyBatch.is_live) changes
no loss and no gradient, and stays out of the forward. What is live follows from the noise: every rank computes it for
whole sequences on the CPU, and knows the lengths of all others without asking them.

    sequence       0 0 1 1 2 2 3 3                     blocks of 2, of which 0, 2 and 3 are live
    forward        0 0 2 2 3 3 | 0 0 1 1 2 2 3 3
    rank 0 of 2    0 0 . .     | 0 0 3 3               live blocks are dealt one by one, back and forth
    rank 1 of 2    2 2 3 3     | 1 1 2 2               . = padding

Noisy blocks need not lie with the clean positions of their rank, for a rank's attention sees all clean keys. Dealt one
by one, blocks are as many on every rank, up to one, and see about as many keys.
Shapes: B batch, S clean length, N noisy positions of this rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention.context import ContextShard
from model.attention.positions import ForwardPositions


def choose_positions(
    block_ids: Tensor, is_live: Tensor, shard: ContextShard, noisy_lengths: Sequence[int]
) -> ForwardPositions:
    """Return a rank's positions, given block_ids [B, S] and which noisy positions are live, [B, S] bool.

    noisy_lengths: those that the noisy positions of a rank may have (RunConfig.noisy_lengths), ascending. Of these it
    is the shortest in which the live positions of every sequence find room on every rank. At the greatest the forward
    is whole: as many positions, and the attention of a regular layout is cached.
    """
    sequence_length = block_ids.shape[1]
    ranks = deal_blocks(block_ids, is_live, shard.size)
    most = max(int((ranks == rank).sum(dim=1).max()) for rank in range(shard.size))
    length = choose_length(most, noisy_lengths)
    if length == noisy_lengths[-1]:
        return shard.find_whole(sequence_length, doubled=True)
    clean = shard.find_positions(sequence_length, doubled=False)
    return ForwardPositions(_list_places(ranks == shard.rank, length), clean, sequence_length)


def choose_length(most: int, noisy_lengths: Sequence[int]) -> int:
    """Return the shortest length with room for the positions of the fullest sequence; the greatest has it always."""
    return next((length for length in noisy_lengths if length >= most), noisy_lengths[-1])


def deal_blocks(block_ids: Tensor, is_live: Tensor, num_ranks: int) -> Tensor:
    """Return [B, S] the context-parallel rank that computes each live noisy position; -1 for the others.

    Live blocks are numbered in sequence order; of every 2C of them rank r gets numbers r and 2C - 1 - r.
    """
    is_first = torch.ones_like(is_live)
    is_first[:, 1:] = block_ids[:, 1:] != block_ids[:, :-1]
    number = ((is_first & is_live).cumsum(dim=1) - 1) % (2 * num_ranks)
    return torch.where(is_live, torch.minimum(number, 2 * num_ranks - 1 - number), -1)


def _list_places(chosen: Tensor, length: int) -> Tensor:
    """Return [B, length] the places where chosen [B, S] is True, ascending, then -1."""
    first = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :length]
    return torch.where(torch.arange(length) < chosen.sum(dim=1, keepdim=True), first, -1)
