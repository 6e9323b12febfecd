"""Compute attention of one document in regular blocks tile by tile: no masks, no copied keys, no repeated heads (CPU).

The attended pairs are cut into tiles that torch's fused kernel takes as they are. Every tile is a softmax of its own;
tiles of a position are merged by their log-sum-exp (as between the tiles of FlashAttention, arXiv 2205.14135). A
sequence is halved again and again: at every level the positions of a segment's second half see all clean positions of
its first half, all segments of a level in one call. Clean positions end in causal tiles, noisy ones in their own noisy
blocks. If the number of segments is odd, each one attends to all clean positions before it in one call.

Given the merged output and log-sum-exp, the kernel's backward of a tile is that tile's share of the gradients.
Measured (one thread, fp32, 4 heads on 2 of 64, block 32, forward and backward): L 512 14 ms against 23.1 ms of groups
under masks (grouped.py), L 2048 173 ms against 228 ms (`make bench-joint` compares).
Shapes: B batch, H query heads, G key heads, n = H / G, h halves (1 or 2, the clean one last), S clean length,
D head_dim, N segments of all sequences, Q queries and K keys of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
MAX_SEGMENTS = 16  # of a sequence that cannot be halved; more are better served by grouped.py
# Fewer positions waste less on masked pairs (32 against 128: 4 % of the time at L 512, 1 % at L 2048).
MAX_CAUSAL_TILE = 32


@dataclass(frozen=True)
class Tile:
    """Queries that see the same keys, or these causally, in every segment of `size` positions of the sequence.

    query_half, key_half: 0 for the first half, -1 for the last. queries, keys: positions of a segment.
    """

    size: int
    query_half: int
    queries: range
    key_half: int
    keys: range
    causal: bool = False

    @property
    def is_whole(self) -> bool:
        """Return whether it has all queries of its half: each half's first tile, to which the others are added."""
        return len(self.queries) == self.size

    # One view each instead of a chain of them: with small tiles these were a tenth of the time.

    def take_queries(self, tensor: Tensor) -> Tensor:
        """Return a view of contiguous [h, BG, S, n] or [h, BG, S, n, D]: [N, n, queries] or with D.

        Where all see the same keys it is [N, 1, queries * n].
        """
        heads, width = tensor.shape[3], tensor.stride(3)
        step, last = heads * width, tensor.shape[4:]
        shape = (heads, len(self.queries)) if self.causal else (1, len(self.queries) * heads)
        strides = (width, step) if self.causal else (step, width)
        offset = self._offset(tensor, self.query_half, self.queries)
        segments = tensor.shape[1] * tensor.shape[2] // self.size
        ones = (1,) * len(last)
        return tensor.as_strided((segments, *shape, *last), (self.size * step, *strides, *ones), offset)

    def take_keys(self, tensor: Tensor) -> Tensor:
        """Return a view of contiguous [h, BG, S, D]: [N, 1, keys, D]."""
        width = tensor.shape[3]
        segments = tensor.shape[1] * tensor.shape[2] // self.size
        strides = (self.size * width, width, width, 1)
        offset = self._offset(tensor, self.key_half, self.keys)
        return tensor.as_strided((segments, 1, len(self.keys), width), strides, offset)

    @staticmethod
    def _offset(tensor: Tensor, half: int, chosen: range) -> int:
        """Return where the first one lies in memory."""
        assert tensor.is_contiguous()
        return int(tensor.storage_offset()) + half % len(tensor) * tensor.stride(0) + chosen.start * tensor.stride(2)


@dataclass(frozen=True)
class TiledAttention:
    """Attends under a regular layout: length S, block size, and whether positions are [noisy | clean]."""

    sequence_length: int
    block_size: int
    doubled: bool

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Map query [B, H, R, D], key and value [B, G, R, D] to [B, H, R, D]."""
        return _TiledAttention.apply(query, key, value, self)

    def halve(self, half: int, size: int) -> Iterator[Tile]:
        """Yield tiles of all clean keys before the segment of `size` positions that a position of `half` is in."""
        while self.sequence_length // size % 2 == 0:
            yield Tile(2 * size, half, range(size, 2 * size), -1, range(size))
            size *= 2
        for first in range(size, self.sequence_length, size):
            yield Tile(self.sequence_length, half, range(first, first + size), -1, range(first))


@cache  # the same in every layer and step
def cut_tiles(form: TiledAttention) -> tuple[Tile, ...]:
    """Return the tiles of a layout; the first one of every half is whole."""
    size, block = _choose_causal_tile(form.sequence_length), range(form.block_size)
    tiles = [Tile(size, -1, range(size), -1, range(size), causal=True), *form.halve(-1, size)]
    if form.doubled:
        tiles += [Tile(form.block_size, 0, block, 0, block), *form.halve(0, form.block_size)]
    return tuple(tiles)


def fits_tiles(sequence_length: int, block_size: int) -> bool:
    """Return whether a regular layout divides into few tiles: whole blocks, halved down to a few segments."""
    if sequence_length % block_size:
        return False
    segments = sequence_length // block_size
    while segments % 2 == 0:
        segments //= 2
    return segments <= MAX_SEGMENTS


def _choose_causal_tile(sequence_length: int) -> int:
    """Return the largest segment that halving gives with at most MAX_CAUSAL_TILE positions; or the smallest."""
    size = sequence_length
    while size > MAX_CAUSAL_TILE and size % 2 == 0:
        size //= 2
    return size


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, form: TiledAttention) -> Tensor:
        shape, groups = query.shape, key.shape[1]
        query, key, value = (_split_halves(tensor, form, groups) for tensor in (query, key, value))
        key, value = key.squeeze(3), value.squeeze(3)
        out, lse = _attend_tiles(form, query, key, value)
        out = _join_halves(out, shape)
        ctx.form, ctx.groups = form, groups
        ctx.save_for_backward(query, key, value, out, lse)  # the output projection saves `out` too: the same memory
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        batch, _, num_positions, dim = shape = grad.shape
        grad, out = (_split_halves(tensor, ctx.form, ctx.groups) for tensor in (grad, out))
        grads = _differentiate_tiles(ctx.form, grad, query, key, value, out, lse)
        key_shape = torch.Size((batch, ctx.groups, num_positions, dim))
        shapes = (shape, key_shape, key_shape)
        return *(_join_halves(share.to(grad.dtype), its) for share, its in zip(grads, shapes, strict=True)), None


def _split_halves(heads: Tensor, form: TiledAttention, groups: int) -> Tensor:
    """Map [B, H, R, D] to [h, BG, S, n, D], contiguous."""
    by_group = heads.unflatten(1, (groups, -1)).unflatten(3, (-1, form.sequence_length))  # [B, G, n, h, S, D]
    return by_group.permute(3, 0, 1, 4, 2, 5).flatten(1, 2).contiguous()


def _join_halves(halves: Tensor, shape: torch.Size) -> Tensor:
    """Map [h, BG, S, n, D] (keys: [h, BG, S, D]) to `shape` [B, H, R, D], positions first in memory."""
    batch, heads, num_positions, dim = shape
    by_group = halves.view(
        halves.shape[0], batch, -1, halves.shape[2], heads * batch // halves.shape[1], dim
    )  # [h, B, G, S, n, D]
    return by_group.permute(0, 3, 1, 2, 4, 5).reshape(num_positions, batch, heads, dim).permute(1, 2, 0, 3)


def _attend_tiles(form: TiledAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output [h, BG, S, n, D] and its log-sum-exp [h, BG, S, n], the latter at least fp32."""
    exact = torch.promote_types(query.dtype, torch.float32)
    out, lse = torch.empty_like(query, dtype=exact), torch.empty_like(query[..., 0], dtype=exact)
    for tile in cut_tiles(form):
        queries = tile.take_queries(query)
        keys, values = (_expand(tile.take_keys(tensor), queries) for tensor in (key, value))
        part, part_lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
            queries, keys, values, 0.0, tile.causal
        )
        total, total_lse = tile.take_queries(out), tile.take_queries(lse)
        if tile.is_whole:
            total.copy_(part)
            total_lse.copy_(part_lse)
        else:
            _merge(total, total_lse, part, part_lse)
    return out.to(query.dtype), lse


def _expand(keys: Tensor, queries: Tensor) -> Tensor:
    """Return the keys once per query head, as the CPU kernel wants them; that takes no memory (stride 0)."""
    return keys.expand(-1, queries.shape[1], -1, -1)


def _merge(total: Tensor, total_lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge two softmaxes over different keys into one, in place."""
    merged = torch.logaddexp(total_lse, part_lse)
    total.mul_((total_lse - merged).exp_()[..., None]).addcmul_(part, (part_lse - merged).exp_()[..., None])
    total_lse.copy_(merged)


def _differentiate_tiles(
    form: TiledAttention, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> list[Tensor]:
    """Return the gradients of query, key, value in their shapes, at least fp32."""
    exact = torch.promote_types(query.dtype, torch.float32)
    grads = [torch.empty_like(tensor, dtype=exact) for tensor in (query, key, value)]
    for tile in cut_tiles(form):
        queries, tile_grad, tile_out, tile_lse = (tile.take_queries(tensor) for tensor in (query, grad, out, lse))
        keys, values = (_expand(tile.take_keys(tensor), queries) for tensor in (key, value))
        shares = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            tile_grad, queries, keys, values, tile_out, tile_lse, 0.0, tile.causal
        )
        put = Tensor.copy_ if tile.is_whole else Tensor.add_
        put(tile.take_queries(grads[0]), shares[0])
        for total, share in zip(grads[1:], shares[1:], strict=True):
            put(tile.take_keys(total), share.sum(1, keepdim=True) if share.shape[1] > 1 else share)
    return grads
