"""Attention by structure: dense products over the pieces that are not empty (on the CPU: packed documents, short ones).

The clean half is causal attention. The noisy half is computed in groups of neighbouring rows: a group's keys are the
clean rows before its last block and the noisy rows of its own blocks, about L^2 / 2 pairs instead of the 4 L^2 of a
dense mask over both halves. A context-parallel rank does the same with its rows (context.py), clean ones in groups too.
Shapes: B batch, H query heads, G key heads, S clean length, R rows, D head_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.attention.context import WHOLE, ContextShard
from model.attention.layout import SequenceLayout, compute_block_ends, compute_block_starts

# Rows per group: fewer wastes less on the blocks of a group that do not see each other, more makes larger products.
# 128 measured fastest at S 512 to 2048 with blocks of 32 (variants: 32, 64, 128, 256).
ROWS_PER_GROUP = 128


@dataclass(frozen=True)
class NoisyGroup:
    """Noisy rows [first, last) with keys clean[:prefix] and noisy[low:high]; mask [B, 1, rows, keys], None = all.

    Noisy rows are counted on this rank, clean ones in the sequence.
    """

    first: int
    last: int
    prefix: int
    low: int
    high: int
    mask: Tensor | None


@dataclass(frozen=True)
class CleanGroup:
    """Clean rows [first, last) of a context shard with keys clean[:prefix]; mask [B, 1, rows, prefix]."""

    first: int
    last: int
    prefix: int
    mask: Tensor


@dataclass(frozen=True)
class SplitAttention:
    """Callable form of a layout.

    noisy_rows: this rank's, before its clean ones; 0 without noise. clean_mask [B, 1, S, S] where documents restrict
    the causal half, else None. clean_groups: instead, where this rank holds a part of the sequence.
    """

    noisy_rows: int
    noisy_groups: tuple[NoisyGroup, ...]
    clean_mask: Tensor | None = None
    clean_groups: tuple[CleanGroup, ...] = ()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, H, R, D], key and value [B, G, K, D] -> [B, H, R, D]; K = R, or all that a context shard sees."""
        if not self.noisy_groups:
            return self._attend_clean(query, key, value)
        halves = (tensor.tensor_split([self.noisy_rows], dim=2) for tensor in (query, key, value))
        (noisy_query, query), (noisy_key, key), (noisy_value, value) = halves
        noisy = [self._attend_group(g, noisy_query, noisy_key, noisy_value, key, value) for g in self.noisy_groups]
        return torch.cat([*noisy, self._attend_clean(query, key, value)], dim=2)

    def _attend_clean(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.clean_groups:
            return torch.cat([self._attend_clean_group(g, query, key, value) for g in self.clean_groups], dim=2)
        causal = self.clean_mask is None
        return scaled_dot_product_attention(
            query, key, value, attn_mask=self.clean_mask, is_causal=causal, enable_gqa=True
        )

    @staticmethod
    def _attend_clean_group(group: CleanGroup, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = query[:, :, group.first : group.last]
        keys, values = key[:, :, : group.prefix], value[:, :, : group.prefix]
        return scaled_dot_product_attention(rows, keys, values, attn_mask=group.mask, enable_gqa=True)

    @staticmethod
    def _attend_group(
        group: NoisyGroup, query: Tensor, noisy_key: Tensor, noisy_value: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        keys = torch.cat([key[:, :, : group.prefix], noisy_key[:, :, group.low : group.high]], dim=2)
        values = torch.cat([value[:, :, : group.prefix], noisy_value[:, :, group.low : group.high]], dim=2)
        rows = query[:, :, group.first : group.last]
        return scaled_dot_product_attention(rows, keys, values, attn_mask=group.mask, enable_gqa=True)


def build_split_attention(layout: SequenceLayout, shard: ContextShard = WHOLE) -> SplitAttention:
    """Pieces and masks of a layout; masks have B = 1 where all sequences are laid out alike."""
    layout = layout.without_repeats()
    spans = shard.spans(layout.sequence_length)
    noisy_rows, noisy_groups = 0, ()
    if layout.doubled:
        noisy_rows = layout.sequence_length // shard.size
        noisy_groups = tuple(_build_group(layout, *edges) for edges in _cut_into_groups(spans))
    if shard.size == 1:
        return SplitAttention(noisy_rows, noisy_groups, _build_clean_mask(layout))
    clean_groups = tuple(_build_clean_group(layout, *edges) for edges in _cut_into_groups(spans))
    return SplitAttention(noisy_rows, noisy_groups, clean_groups=clean_groups)


def _cut_into_groups(spans: list[range]) -> Iterator[tuple[int, int, int]]:
    """(first, last, shift) of every group: rows in the sequence, and how far back they lie on this rank."""
    held = 0
    for span in spans:
        for first in range(span.start, span.stop, ROWS_PER_GROUP):
            yield first, min(first + ROWS_PER_GROUP, span.stop), span.start - held
        held += len(span)


def _build_clean_mask(layout: SequenceLayout) -> Tensor | None:
    documents = layout.clean_document_ids
    if (documents == documents[:, :1]).all():
        return None
    same_document = documents[:, :, None] == documents[:, None, :]
    return same_document.tril()[:, None]


def _build_clean_group(layout: SequenceLayout, first: int, last: int, shift: int) -> CleanGroup:
    documents = layout.clean_document_ids
    same_document = documents[:, first:last, None] == documents[:, None, :last]
    return CleanGroup(first - shift, last - shift, last, same_document.tril(first)[:, None])


def _build_group(layout: SequenceLayout, first: int, last: int, shift: int) -> NoisyGroup:
    starts = compute_block_starts(layout.block_ids)[:, first:last]
    ends = compute_block_ends(layout.block_ids)[:, first:last]
    prefix, low, high = int(starts.max()), int(starts.min()), int(ends.max())
    documents, clean_documents = layout.document_ids, layout.clean_document_ids
    same_document = documents[:, first:last, None] == clean_documents[:, None, :prefix]
    sees_clean = same_document & (torch.arange(prefix, device=starts.device) < starts[:, :, None])
    same_block = layout.block_ids[:, first:last, None] == layout.block_ids[:, None, low:high]
    sees_noisy = same_block & (documents[:, first:last, None] == documents[:, None, low:high])
    mask = torch.cat([sees_clean, sees_noisy], dim=2)
    edges = (first - shift, last - shift, prefix, low - shift, high - shift)
    return NoisyGroup(*edges, None if mask.all() else mask[:, None])
