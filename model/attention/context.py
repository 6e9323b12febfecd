"""Context parallelism: which rows of a sequence a rank holds, and how it comes by the clean keys of the others.

A sequence of S tokens is cut into 2C equal chunks per round for C ranks; of each round rank r holds chunks r and
2C - 1 - r, so that early rows (which see little) and late rows (which see much) go together. One round balances one
document; packed documents take many, and since all clean keys are gathered anyway, rounds cost nothing. In the joint
stage a rank holds the same chunks of both halves, [noisy | clean]. Chunk edges are block edges, so a noisy row finds
its own noisy block at home: only clean keys and values travel, gathered before attention and their gradients summed and
scattered after it. Shapes: B batch, G key heads, D head_dim, S clean length, N noisy rows of this rank: S / C, or 0.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

# Whole tiles of FlexAttention (128 rows). Over 16 ranks and 262144 tokens of packed documents the fullest rank computes
# 1 to 3 % more than the mean; 1 % with chunks of 128, 7 to 15 % with 2048 (tests/bench/joint/balance.py).
CHUNK_ROWS = 512


@dataclass(frozen=True)
class ContextShard:
    """One rank's part of every sequence.

    rank, size: of it in its context-parallel group; group: None for size 1. block_size: chunks are multiples of it.
    chunk_rows: least length of a chunk where there is more than one round.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    block_size: int = 1
    chunk_rows: int = CHUNK_ROWS

    def count_rounds(self, sequence_length: int) -> int:
        """As many as leave chunks of whole blocks that are long enough; at least 1."""
        chunk, rest = divmod(sequence_length, 2 * self.size)
        assert rest == 0, "conf/rules/layout.py lets no such sequence through"
        rounds = range(chunk // self.chunk_rows, 1, -1)
        return next((count for count in rounds if chunk % (count * self.block_size) == 0), 1)

    def spans(self, sequence_length: int) -> list[range]:
        """In-half rows of this rank, in order, as chunks."""
        if self.size == 1:
            return [range(sequence_length)]
        rounds = self.count_rounds(sequence_length)
        chunk = sequence_length // (2 * self.size * rounds)
        places = (self.rank, 2 * self.size - 1 - self.rank)
        numbers = [turn * 2 * self.size + place for turn in range(rounds) for place in places]
        return [range(number * chunk, (number + 1) * chunk) for number in numbers]

    def indices(self, sequence_length: int) -> Tensor:
        """In-half rows of this rank [S / size]."""
        return torch.cat([torch.arange(span.start, span.stop) for span in self.spans(sequence_length)])

    def rows(self, sequence_length: int, doubled: bool) -> Tensor:
        """Rows of this rank among those of the whole sequence, [R / size]: of [noisy | clean] where it is doubled."""
        indices = self.indices(sequence_length)
        return torch.cat([indices, indices + sequence_length]) if doubled else indices


WHOLE = ContextShard()


def find_context_shard(block_size: int) -> ContextShard:
    """This rank's, by megatron-core's groups."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return WHOLE
    group: Any = parallel_state.get_context_parallel_group()
    return ContextShard(parallel_state.get_context_parallel_rank(), size, group, block_size)


@dataclass(frozen=True)
class ContextAttention:
    """Attention of this rank's rows over clean rows of all ranks.

    attend: query [B, H, R, D], key and value [B, G, N + S, D] -> [B, H, R, D]. clean_rows: S / size.
    """

    shard: ContextShard
    clean_rows: int
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, H, R, D], key and value [B, G, R, D] -> [B, H, R, D]; R rows of this rank."""
        key, value = GatherCleanRows.apply(key, value, self.shard, self.clean_rows)
        return self.attend(query, key, value)


class GatherCleanRows(torch.autograd.Function):
    """Rows of this rank -> its noisy rows and the whole sequence's clean ones. One collective each way."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, shard: ContextShard, clean_rows: int) -> tuple[Tensor, Tensor]:
        """key, value [B, G, N + S / size, D] -> key, value [B, G, N + S, D], clean rows in sequence order."""
        ctx.shard, ctx.noisy_rows = shard, key.shape[2] - clean_rows
        sent = torch.stack([key[:, :, ctx.noisy_rows :], value[:, :, ctx.noisy_rows :]])
        received = sent.new_empty(2 * shard.size, *sent.shape[1:])
        dist.all_gather_into_tensor(received, sent, group=shard.group)
        return (
            _join(key[:, :, : ctx.noisy_rows], received[0::2], shard),
            _join(value[:, :, : ctx.noisy_rows], received[1::2], shard),
        )

    @staticmethod
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of clean rows are summed over the ranks that saw them; each rank gets those of its rows."""
        noisy, shard = ctx.noisy_rows, ctx.shard
        batch, heads, rows, head_dim = grad_key.shape
        shape = (batch, heads, (rows - noisy) // shard.size, head_dim)
        sent = grad_key.new_empty(2 * shard.size, *shape)
        for kind, grad in enumerate((grad_key, grad_value)):
            for part, place in _match_chunks(sent[kind::2], grad[:, :, noisy:], shard):
                part.copy_(place)
        received = sent.new_empty(2, *shape)
        dist.reduce_scatter_tensor(received, sent, group=shard.group)
        return (
            torch.cat([grad_key[:, :, :noisy], received[0]], dim=2),
            torch.cat([grad_value[:, :, :noisy], received[1]], dim=2),
            None,
            None,
        )


def _join(noisy: Tensor, by_rank: Tensor, shard: ContextShard) -> Tensor:
    """noisy [B, G, N, D], by_rank [size, B, G, S / size, D] -> [B, G, N + S, D]."""
    batch, heads, num_noisy, head_dim = noisy.shape
    joined = noisy.new_empty(batch, heads, num_noisy + shard.size * by_rank.shape[3], head_dim)
    joined[:, :, :num_noisy] = noisy
    for part, place in _match_chunks(by_rank, joined[:, :, num_noisy:], shard):
        place.copy_(part)
    return joined


def _match_chunks(by_rank: Tensor, clean: Tensor, shard: ContextShard) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the same rows in by_rank [size, B, G, S / size, D] and clean [B, G, S, D]; of all rounds at once."""
    rounds, last = shard.count_rounds(clean.shape[2]), 2 * shard.size - 1
    places = clean.unflatten(2, (rounds, 2 * shard.size, -1))
    for rank, rows in enumerate(by_rank.unflatten(3, (rounds, 2, -1))):
        yield rows[:, :, :, 0], places[:, :, :, rank]
        yield rows[:, :, :, 1], places[:, :, :, last - rank]
