"""Context parallelism: which positions of a sequence a rank holds, and how it gathers the other ranks' clean keys.

A sequence of S tokens is cut into 2C equal chunks per round for C ranks; of each round rank r holds chunks r and
2C - 1 - r, so that early positions (which see little) and late ones (which see much) go together. One round balances
one document; packed documents take many, and since all clean keys are gathered anyway, rounds cost nothing. In the
joint stage a rank holds whole noisy blocks: those of the same chunks, whose edges are block edges, or its share of the
live ones (live.py). Only clean keys and values travel, gathered before attention; their gradients are summed and
scattered after it.
Shapes: B batch, G key heads, D head_dim, S clean length, N noisy positions of this rank: at most S / C.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from model.attention.positions import ForwardPositions

# Whole tiles of FlexAttention (128 positions). Over 16 ranks and 262144 tokens of packed documents the fullest rank
# computes 1 to 3 % more than the mean; 1 % with chunks of 128, 7 to 15 % with 2048 (tests/bench/joint/balance.py).
MIN_CHUNK_LENGTH = 512


@dataclass(frozen=True)
class ContextShard:
    """Names one rank's part of every sequence.

    rank, size: in the rank's context-parallel group; group: None for size 1. block_size: chunks are multiples of it.
    min_chunk_length: positions of a chunk, at least, where there is more than one round.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    block_size: int = 1
    min_chunk_length: int = MIN_CHUNK_LENGTH

    def count_rounds(self, sequence_length: int) -> int:
        """Return as many rounds as leave chunks of whole blocks that are long enough; at least 1."""
        chunk, rest = divmod(sequence_length, 2 * self.size)
        assert rest == 0, "conf/rules/layout.py lets no such sequence through"
        rounds = range(chunk // self.min_chunk_length, 1, -1)
        return next((count for count in rounds if chunk % (count * self.block_size) == 0), 1)

    def find_chunk_length(self, sequence_length: int) -> int:
        """Return the positions of a chunk."""
        return sequence_length // (2 * self.size * self.count_rounds(sequence_length))

    def find_chunks(self, sequence_length: int) -> list[range]:
        """Return the clean positions of this rank, in order, as chunks."""
        if self.size == 1:
            return [range(sequence_length)]
        chunk = self.find_chunk_length(sequence_length)
        places = (self.rank, 2 * self.size - 1 - self.rank)
        numbers = [first + place for first in range(0, sequence_length // chunk, 2 * self.size) for place in places]
        return [range(number * chunk, (number + 1) * chunk) for number in numbers]

    def find_positions(self, sequence_length: int, doubled: bool) -> Tensor:
        """Return this rank's positions among those of the whole sequence [R / size]: of [noisy | clean] if doubled."""
        positions = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in self.find_chunks(sequence_length)])
        return torch.cat([positions, positions + sequence_length]) if doubled else positions

    def find_whole(self, sequence_length: int, doubled: bool) -> ForwardPositions:
        """Return this rank's positions of a whole forward: the same chunks of both halves if doubled."""
        clean = self.find_positions(sequence_length, doubled=False)
        return ForwardPositions(clean[None, : len(clean) if doubled else 0], clean, sequence_length)

    def cuts_a_block(self, block_ids: Tensor) -> bool:
        """Return whether a chunk of this rank begins within a block of [B, S] block_ids."""
        starts = [chunk.start for chunk in self.find_chunks(block_ids.shape[1]) if chunk.start]
        index = torch.tensor(starts, dtype=torch.int64)
        return not bool((block_ids[:, index] != block_ids[:, index - 1]).all())


WHOLE = ContextShard()


def find_context_shard(block_size: int) -> ContextShard:
    """Return this rank's shard, by megatron-core's groups."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return WHOLE
    group: Any = parallel_state.get_context_parallel_group()
    return ContextShard(parallel_state.get_context_parallel_rank(), size, group, block_size)


@dataclass(frozen=True)
class ContextAttention:
    """Lets this rank's positions attend over the clean positions of all ranks.

    attend: query [B, H, R, D], key and value [B, G, N + S, D] -> [B, H, R, D]. num_clean: this rank's, S / size.
    """

    shard: ContextShard
    num_clean: int
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Map query [B, H, R, D], key and value [B, G, R, D] to [B, H, R, D]; R positions of this rank."""
        key, value = GatherCleanKeys.apply(key, value, self.shard, self.num_clean)
        return self.attend(query, key, value)


class GatherCleanKeys(torch.autograd.Function):
    """Exchanges this rank's clean keys and values for the whole sequence's; one collective each way."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, shard: ContextShard, num_clean: int) -> tuple[Tensor, Tensor]:
        """Map key, value [B, G, N + S / size, D] to [B, G, N + S, D], clean ones in sequence order."""
        ctx.shard, ctx.num_noisy = shard, key.shape[2] - num_clean
        sent = torch.stack([key[:, :, ctx.num_noisy :], value[:, :, ctx.num_noisy :]])
        received = sent.new_empty(2 * shard.size, *sent.shape[1:])
        dist.all_gather_into_tensor(received, sent, group=shard.group)
        return (
            _join(key[:, :, : ctx.num_noisy], received[0::2], shard),
            _join(value[:, :, : ctx.num_noisy], received[1::2], shard),
        )

    @staticmethod
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Sum the gradients of clean keys over the ranks that saw them; each rank gets those of its own."""
        num_noisy, shard = ctx.num_noisy, ctx.shard
        batch, heads, num_keys, head_dim = grad_key.shape
        shape = (batch, heads, (num_keys - num_noisy) // shard.size, head_dim)
        sent = grad_key.new_empty(2 * shard.size, *shape)
        for kind, grad in enumerate((grad_key, grad_value)):
            for part, place in _match_chunks(sent[kind::2], grad[:, :, num_noisy:], shard):
                part.copy_(place)
        received = sent.new_empty(2, *shape)
        dist.reduce_scatter_tensor(received, sent, group=shard.group)
        return (
            torch.cat([grad_key[:, :, :num_noisy], received[0]], dim=2),
            torch.cat([grad_value[:, :, :num_noisy], received[1]], dim=2),
            None,
            None,
        )


def _join(noisy: Tensor, by_rank: Tensor, shard: ContextShard) -> Tensor:
    """Map noisy [B, G, N, D] and by_rank [size, B, G, S / size, D] to [B, G, N + S, D]."""
    batch, heads, num_noisy, head_dim = noisy.shape
    joined = noisy.new_empty(batch, heads, num_noisy + shard.size * by_rank.shape[3], head_dim)
    joined[:, :, :num_noisy] = noisy
    for part, place in _match_chunks(by_rank, joined[:, :, num_noisy:], shard):
        place.copy_(part)
    return joined


def _match_chunks(by_rank: Tensor, clean: Tensor, shard: ContextShard) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of the same positions in by_rank [size, B, G, S / size, D] and in clean [B, G, S, D].

    A view holds those of all rounds.
    """
    rounds, last = shard.count_rounds(clean.shape[2]), 2 * shard.size - 1
    places = clean.unflatten(2, (rounds, 2 * shard.size, -1))
    for rank, part in enumerate(by_rank.unflatten(3, (rounds, 2, -1))):
        yield part[:, :, :, 0], places[:, :, :, rank]
        yield part[:, :, :, 1], places[:, :, :, last - rank]
