"""Context parallelism: which rows of a sequence a rank holds, and how it comes by the clean keys of the others.

A sequence of S tokens is cut into 2C equal chunks for C ranks; rank r holds chunks r and 2C - 1 - r, so that early rows
(which see little) and late rows (which see much) go together. In the joint stage it holds the same chunks of both
halves, [noisy | clean]. Chunk edges are block edges, so a noisy row finds its own noisy block at home: only clean keys
and values travel, gathered before attention and their gradients summed and scattered after it.
Shapes: B batch, G key heads, D head_dim, S clean length, N noisy rows of this rank: S / C, or 0 without noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


@dataclass(frozen=True)
class ContextShard:
    """One rank's part of every sequence. rank, size: of it in its context-parallel group; group: None for size 1."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def spans(self, sequence_length: int) -> list[range]:
        """In-half rows of this rank, in order, as runs of neighbours."""
        if self.size == 1:
            return [range(sequence_length)]
        chunk, rest = divmod(sequence_length, 2 * self.size)
        assert rest == 0, "conf/rules.py lets no such sequence through"
        return [range(place * chunk, (place + 1) * chunk) for place in (self.rank, 2 * self.size - 1 - self.rank)]

    def indices(self, sequence_length: int) -> Tensor:
        """In-half rows of this rank [S / size]."""
        return torch.cat([torch.arange(span.start, span.stop) for span in self.spans(sequence_length)])

    def rows(self, sequence_length: int, doubled: bool) -> Tensor:
        """Rows of this rank among those of the whole sequence, [R / size]: of [noisy | clean] where it is doubled."""
        indices = self.indices(sequence_length)
        return torch.cat([indices, indices + sequence_length]) if doubled else indices


WHOLE = ContextShard()


def find_context_shard() -> ContextShard:
    """This rank's, by megatron-core's groups."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return WHOLE
    group: Any = parallel_state.get_context_parallel_group()
    return ContextShard(parallel_state.get_context_parallel_rank(), size, group)


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
        received = sent.new_empty(shard.size * len(sent), *sent.shape[1:])
        dist.all_gather_into_tensor(received, sent, group=shard.group)
        return (
            torch.cat([key[:, :, : ctx.noisy_rows], *_in_sequence_order(received[0::2])], dim=2),
            torch.cat([value[:, :, : ctx.noisy_rows], *_in_sequence_order(received[1::2])], dim=2),
        )

    @staticmethod
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of clean rows are summed over the ranks that saw them; each rank gets those of its rows."""
        noisy, shard = ctx.noisy_rows, ctx.shard
        batch, heads, rows, head_dim = grad_key.shape
        shape = (batch, heads, (rows - noisy) // shard.size, head_dim)
        sent = grad_key.new_empty(2 * shard.size, *shape)
        for kind, grad in enumerate((grad_key, grad_value)):
            chunks = grad[:, :, noisy:].chunk(2 * shard.size, dim=2)
            for place, chunk in zip(_in_sequence_order(sent[kind::2]), chunks, strict=True):
                place.copy_(chunk)
        received = sent.new_empty(2, *shape)
        dist.reduce_scatter_tensor(received, sent, group=shard.group)
        return (
            torch.cat([grad_key[:, :, :noisy], received[0]], dim=2),
            torch.cat([grad_value[:, :, :noisy], received[1]], dim=2),
            None,
            None,
        )


def _in_sequence_order(by_rank: Tensor) -> list[Tensor]:
    """by_rank [size, B, G, S / size, D] -> views of its 2 * size chunks [B, G, S / (2 * size), D]."""
    first, second = by_rank.chunk(2, dim=3)
    return [*first.unbind(), *reversed(second.unbind())]
