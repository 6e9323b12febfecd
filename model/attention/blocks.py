"""Attention of one document in regular blocks, from torch's fused kernel of the device (kernels.py): no masks, no keys
copied for groups of rows, no repeated heads.

The pairs that see each other are cut into pieces that the kernel takes as they are. Every piece is a softmax of its
own; pieces of a row are merged by their log-sum-exp (as between the tiles of FlashAttention, arXiv 2205.14135). A
sequence is halved again and again: at every level the rows of a segment's second half see all clean rows of its first
half, all segments of a level in one call. Clean rows end in causal leaves, noisy rows in their own noisy blocks. A
count of blocks that halving leaves odd becomes one call per segment, over all clean rows before it.

Given the merged output and log-sum-exp, the kernel's backward of a piece is that piece's share of the gradients.
Measured (one thread, fp32, 4 heads on 2 of 64, block 32, forward and backward): L 512 17.5 ms against 23.1 ms of groups
under masks (split.py), L 2048 190 ms against 228 ms; one prefix per group of 128 rows, merged alike, 19.6 and 227 ms;
since then 14 and 173 ms by leaves of 32 rows and fewer views (`make bench-joint` compares).
On CUDA not measured yet (tests/bench/GPU.md), and not chosen there.
Shapes: B batch, H query heads, G key heads, n = H / G, h halves (1 or 2, the clean one last), S clean length,
D head_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from model.attention.kernels import Kernel, State, find_kernel

MOST_SEGMENTS = 16  # of a sequence that cannot be halved; more are better served by split.py


@dataclass(frozen=True)
class Piece:
    """Rows that see the same keys, or these causally, in every segment of `size` rows of the sequence.

    query_half, key_half: 0 for the first half, -1 for the last. queries, keys: rows of a segment.
    """

    size: int
    query_half: int
    queries: range
    key_half: int
    keys: range
    causal: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether it has all rows and keys of its half: each half's first piece, which the others add to."""
        return len(self.queries) == self.size

    # One view each instead of a chain of them: of small pieces these were a tenth of the time.

    def take_queries(self, rows: Tensor) -> Tensor:
        """View of contiguous [h, BG, S, n] or [h, BG, S, n, D]: [BG * segments, n, queries] or with D, where all rows
        see the same keys [BG * segments, 1, queries * n]."""
        heads, width = rows.shape[3], rows.stride(3)
        row, last = heads * width, rows.shape[4:]
        shape = (heads, len(self.queries)) if self.causal else (1, len(self.queries) * heads)
        strides = (width, row) if self.causal else (row, width)
        offset = self._offset(rows, self.query_half, self.queries)
        segments = rows.shape[1] * rows.shape[2] // self.size
        ones = (1,) * len(last)
        return rows.as_strided((segments, *shape, *last), (self.size * row, *strides, *ones), offset)

    def take_keys(self, rows: Tensor) -> Tensor:
        """View of contiguous [h, BG, S, D]: [BG * segments, 1, keys, D]."""
        width = rows.shape[3]
        segments = rows.shape[1] * rows.shape[2] // self.size
        strides = (self.size * width, width, width, 1)
        offset = self._offset(rows, self.key_half, self.keys)
        return rows.as_strided((segments, 1, len(self.keys), width), strides, offset)

    @staticmethod
    def _offset(rows: Tensor, half: int, chosen: range) -> int:
        """Of the first one in memory."""
        assert rows.is_contiguous()
        return int(rows.storage_offset()) + half % len(rows) * rows.stride(0) + chosen.start * rows.stride(2)


@dataclass(frozen=True)
class BlockAttention:
    """Callable form of a regular layout: length S, block size, and whether rows are [noisy | clean]."""

    sequence_length: int
    block_size: int
    doubled: bool

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, H, R, D], key and value [B, G, R, D] -> [B, H, R, D]."""
        return _BlockAttention.apply(query, key, value, self)

    def halve(self, half: int, size: int) -> Iterator[Piece]:
        """All clean rows before the segment of `size` rows that a row of `half` is in."""
        while self.sequence_length // size % 2 == 0:
            yield Piece(2 * size, half, range(size, 2 * size), -1, range(size))
            size *= 2
        for first in range(size, self.sequence_length, size):
            yield Piece(self.sequence_length, half, range(first, first + size), -1, range(first))


@cache  # the same in every layer and step
def cut_pieces(form: BlockAttention, largest_leaf: int) -> tuple[Piece, ...]:
    """The first piece of every half is whole. largest_leaf: most clean rows of a causal piece."""
    leaf, block = _choose_leaf(form.sequence_length, largest_leaf), range(form.block_size)
    pieces = [Piece(leaf, -1, range(leaf), -1, range(leaf), causal=True), *form.halve(-1, leaf)]
    if form.doubled:
        pieces += [Piece(form.block_size, 0, block, 0, block), *form.halve(0, form.block_size)]
    return tuple(pieces)


def suits(sequence_length: int, block_size: int) -> bool:
    """Whether a regular layout divides into few pieces: whole blocks, and halves of them down to a few segments."""
    if sequence_length % block_size:
        return False
    segments = sequence_length // block_size
    while segments % 2 == 0:
        segments //= 2
    return segments <= MOST_SEGMENTS


def _choose_leaf(sequence_length: int, largest: int) -> int:
    """Largest segment of clean rows, of those that halving gives, with at most so many; or the smallest."""
    leaf = sequence_length
    while leaf > largest and leaf % 2 == 0:
        leaf //= 2
    return leaf


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, form: BlockAttention) -> Tensor:
        shape, groups = query.shape, key.shape[1]
        query, key, value = (_split_halves(tensor, form, groups) for tensor in (query, key, value))
        key, value = key.squeeze(3), value.squeeze(3)
        kernel = find_kernel(query.device)
        out, lse, states = _attend_pieces(kernel, form, query, key, value)
        out = _join_halves(out, shape)
        ctx.form, ctx.groups, ctx.kernel, ctx.states = form, groups, kernel, states
        ctx.save_for_backward(query, key, value, out, lse)  # of `out` the output projection keeps the same memory
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        batch, _, rows, dim = shape = grad.shape
        grad, out = (_split_halves(tensor, ctx.form, ctx.groups) for tensor in (grad, out))
        grads = _differentiate_pieces(ctx, grad, query, key, value, out, lse)
        key_shape = torch.Size((batch, ctx.groups, rows, dim))
        shapes = (shape, key_shape, key_shape)
        return *(_join_halves(share.to(grad.dtype), its) for share, its in zip(grads, shapes, strict=True)), None


def _split_halves(heads: Tensor, form: BlockAttention, groups: int) -> Tensor:
    """[B, H, R, D] -> [h, BG, S, n, D], contiguous."""
    by_group = heads.unflatten(1, (groups, -1)).unflatten(3, (-1, form.sequence_length))  # [B, G, n, h, S, D]
    return by_group.permute(3, 0, 1, 4, 2, 5).flatten(1, 2).contiguous()


def _join_halves(rows: Tensor, shape: torch.Size) -> Tensor:
    """[h, BG, S, n, D] or, of keys, [h, BG, S, D] -> [B, H, R, D], whose rows come first in memory."""
    batch, heads, num_rows, dim = shape
    by_row = rows.view(
        rows.shape[0], batch, -1, rows.shape[2], heads * batch // rows.shape[1], dim
    )  # [h, B, G, S, n, D]
    return by_row.permute(0, 3, 1, 2, 4, 5).reshape(num_rows, batch, heads, dim).permute(1, 2, 0, 3)


def _attend_pieces(
    kernel: Kernel, form: BlockAttention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, list[State]]:
    """Output [h, BG, S, n, D], log-sum-exp [h, BG, S, n], at least fp32, and what the kernel keeps of every piece."""
    exact = torch.promote_types(query.dtype, torch.float32)
    out, lse = torch.empty_like(query, dtype=exact), torch.empty_like(query[..., 0], dtype=exact)
    states = list[State]()
    for piece in cut_pieces(form, kernel.largest_leaf):
        queries = piece.take_queries(query)
        keys, values = piece.take_keys(key), piece.take_keys(value)
        part, part_lse, state = kernel.attend(queries, keys, values, piece.causal)
        states.append(state)
        total, total_lse = piece.take_queries(out), piece.take_queries(lse)
        if piece.is_whole:
            total.copy_(part)
            total_lse.copy_(part_lse)
        else:
            _merge(total, total_lse, part, part_lse)
    return out.to(query.dtype), lse, states


def _merge(total: Tensor, total_lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Two softmaxes over different keys become one, in place."""
    merged = torch.logaddexp(total_lse, part_lse)
    total.mul_((total_lse - merged).exp_()[..., None]).addcmul_(part, (part_lse - merged).exp_()[..., None])
    total_lse.copy_(merged)


def _differentiate_pieces(
    ctx: Any, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> list[Tensor]:
    """Gradients of query, key, value in their shapes, at least fp32. ctx: with what the forward kept."""
    exact = torch.promote_types(query.dtype, torch.float32)
    grads = [torch.empty_like(tensor, dtype=exact) for tensor in (query, key, value)]
    pieces = cut_pieces(ctx.form, ctx.kernel.largest_leaf)
    for piece, state in zip(pieces, ctx.states, strict=True):
        queries, grad_piece, out_piece, lse_piece = (piece.take_queries(t) for t in (query, grad, out, lse))
        keys, values = piece.take_keys(key), piece.take_keys(value)
        shares = ctx.kernel.differentiate(grad_piece, queries, keys, values, out_piece, lse_piece, state, piece.causal)
        put = Tensor.copy_ if piece.is_whole else Tensor.add_
        put(piece.take_queries(grads[0]), shares[0])
        for total, share in zip(grads[1:], shares[1:], strict=True):
            put(piece.take_keys(total), share.sum(1, keepdim=True) if share.shape[1] > 1 else share)
    return grads
