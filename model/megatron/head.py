"""Compute the vocabulary head and cross entropy of scored positions alone, in chunks, with gradients in the forward.

Full logits never exist: each chunk of the hidden matrix's rows forms its logits, losses and gradients, and is dropped.
Forming gradients at once saves a second head matmul and holds one chunk of logits. The weight's gradient goes straight
into megatron-core's gradient buffer where there is one.

A chunk processes the vocabulary in tiles: a tile's logits become its softmax while they are in the cache, and the
tile's softmax becomes the chunk's, p = p_tile * exp(lse_tile - lse), right before the matmuls that use it. On the CPU
(tiles of 960 columns) that took the head from 1.17 to 1.05 times its bare matmuls (tests/bench/joint); on a GPU a tile
is the whole vocabulary of a rank.
Shapes: N scored positions (rows of the hidden matrix), n rows of a chunk, H hidden size, V/T words of this rank.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from model.megatron.operators import find_main_gradient, mark_added, stand_in_gradient

# On the CPU: rows and weights of a tile fit a core's cache. With 1024, 4 % slower, rows lie 4 KiB apart and share sets.
TILE_COLUMNS = 960


@dataclass(frozen=True)
class ScoredPositions:
    """Names the N positions of a forward that carry loss.

    positions: [N] int64 index into the flattened [R, B] positions (r * B + b). targets: [N] int64 token that each one
        predicts. weights: [N] fp32 factor of its cross entropy in the loss; zero until the counts of the whole global
        batch are known (pretrain/objective/losses.py).
    inverse_p: [N] fp32 1/p, by which a masked position's cross entropy bounds the loss (1 for clean positions).
    is_noisy: [N] bool. is_text: [N] bool, False for block padding.
    """

    positions: Tensor
    targets: Tensor
    weights: Tensor
    inverse_p: Tensor
    is_noisy: Tensor
    is_text: Tensor

    def fields(self) -> tuple[Tensor, ...]:
        """Return positions, targets, weights, inverse_p, is_noisy, is_text."""
        return self.positions, self.targets, self.weights, self.inverse_p, self.is_noisy, self.is_text

    def to(self, device: torch.device) -> "ScoredPositions":
        """Return the same positions on another device."""
        return ScoredPositions(*(field.to(device) for field in self.fields()))


class ChunkedCrossEntropy(torch.autograd.Function):
    """loss = sum_n weights[n] * CE(hidden[n] @ weight.T, targets[n]); vocabulary split over `group`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        chunk_rows: int,
        group: dist.ProcessGroup,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        """Compute what score_rows returns; needs_grad: whether to form gradients."""
        losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        trains_weight = needs_grad and ctx.needs_input_grad[1]
        grad_weight = main_gradient = find_main_gradient(weight) if trains_weight else None
        if trains_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        memory = _Memory(hidden, weight, chunk_rows)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            chunk = _Chunk(hidden[rows], weight, targets[rows], group, memory)
            losses[rows] = chunk.compute_losses()
            if grad_hidden is not None:
                chunk.add_gradients(weights[rows], grad_hidden[rows], grad_weight)
        ctx.group, ctx.weight = group, weight if main_gradient is not None else None
        if needs_grad:
            ctx.save_for_backward(grad_hidden, None if main_gradient is not None else grad_weight)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients formed in the forward, and sum each rank's share of grad_hidden over the group."""
        grad_hidden, grad_weight = ctx.saved_tensors
        if ctx.group.size() > 1:
            dist.all_reduce(grad_hidden, group=ctx.group)
        if ctx.weight is None:
            grad_weight = None if grad_weight is None else grad_weight.mul_(grad_loss)
        else:
            torch._assert_async(grad_loss == 1, "the gradient of the head's weight was formed for an unscaled loss")
            mark_added(ctx.weight)
            grad_weight = stand_in_gradient(ctx.weight)
        return grad_hidden.mul_(grad_loss), grad_weight, *([None] * 5)


def score_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, chunk_rows: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Map hidden [N, H] and weight [V/T, H] to the loss and the cross entropy of each row [N] (no gradient).

    Both are at least fp32.
    """
    # Asked here: within a Function gradients are always off, and its needs_input_grad knows nothing of no_grad.
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return ChunkedCrossEntropy.apply(hidden, weight, targets, weights, chunk_rows, group, needs_grad)


class VocabularyHead(ColumnParallelLinear):
    """Output layer that returns logits, or the loss of rows without ever holding all their logits.

    Scoring goes through forward, so that megatron-core's hooks on a module's forward (which wait for overlapped
    parameter gathering) see the use of the weight.
    """

    def forward(  # type: ignore[override]
        self, hidden: Tensor, scored: ScoredPositions | None = None, chunk_rows: int = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map hidden [..., H] to logits [..., V/T]; with `scored`, hidden [N, H] to what score_rows returns."""
        if scored is None:
            return super().forward(hidden)[0]
        weight, group = cast(Tensor, self.weight), cast(dist.ProcessGroup, self.tp_group)
        return score_rows(hidden, weight, scored.targets, scored.weights, chunk_rows, group)


class _Memory:
    """Memory for a tile's logits and a chunk's softmaxes, reused by every chunk: on a CPU fresh pages cost time too."""

    def __init__(self, hidden: Tensor, weight: Tensor, chunk_rows: int) -> None:
        # In half precision sums over tiles would be rounded at every tile.
        in_tiles = hidden.device.type == "cpu" and hidden.dtype.itemsize >= torch.float32.itemsize
        self.columns = min(TILE_COLUMNS, len(weight)) if in_tiles else len(weight)
        rows = min(chunk_rows, len(hidden))
        self._logits = hidden.new_empty(rows * self.columns)
        self._softmaxes = hidden.new_empty(rows * len(weight), dtype=torch.promote_types(hidden.dtype, torch.float32))

    def logits(self, rows: int, columns: int) -> Tensor:
        """Return memory for a tile's logits."""
        return self._logits[: rows * columns].view(rows, columns)

    def softmax(self, rows: int, tile: int, columns: int) -> Tensor:
        """Return memory for the softmax of tile number `tile`."""
        start = rows * tile * self.columns
        return self._softmaxes[start : start + rows * columns].view(rows, columns)


class _Chunk:
    """Rows whose softmaxes are held: hidden [n, H] against weight [V/T, H], one softmax [n, columns] per tile."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, group: dist.ProcessGroup, memory: _Memory
    ) -> None:
        self.hidden, self.group = hidden, group
        self.weights = weight.detach().split(memory.columns)
        targets = targets - group.rank() * len(weight)
        is_here = (targets >= 0) & (targets < len(weight))
        tiles = torch.arange(len(self.weights), device=hidden.device)[:, None]
        self.has_target = (is_here & (targets // memory.columns == tiles))[..., None]  # [tiles, n, 1]
        self.columns = torch.where(self.has_target, (targets % memory.columns)[:, None], 0)
        self.softmaxes = [memory.softmax(len(hidden), tile, len(part)) for tile, part in enumerate(self.weights)]
        self.logits = [memory.logits(len(hidden), len(part)) for part in self.weights]
        self.tile_lse: Tensor = torch.empty(0)
        self.lse: Tensor = torch.empty(0)

    def compute_losses(self) -> Tensor:
        """Return the cross entropy of every row [n], at least fp32, and leave each tile's softmax for the gradients."""
        largest, most_probable, found = [], [], []
        for weight, logits, softmax, columns in zip(
            self.weights, self.logits, self.softmaxes, self.columns, strict=True
        ):
            torch.mm(self.hidden, weight.t(), out=logits)
            torch.softmax(logits, dim=-1, dtype=softmax.dtype, out=softmax)
            largest.append(logits.amax(dim=-1))
            most_probable.append(softmax.amax(dim=-1))
            found.append(logits.gather(1, columns))
        # The largest of a softmax is 1 / sum(exp(x - max)): its logarithm gives the sum back.
        most = torch.stack(most_probable)
        self.tile_lse = torch.stack(largest).to(most.dtype) - most.log()
        target_logits = torch.where(self.has_target, torch.stack(found), 0).sum(0)[:, 0].to(most.dtype)
        self.lse, target_logits = self._reduce(self.tile_lse.logsumexp(dim=0), target_logits)
        return self.lse - target_logits

    def _reduce(self, lse: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return both for the whole vocabulary, given those of this rank's share."""
        if self.group.size() == 1:
            return lse, target_logits
        largest = lse.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        sums = torch.stack([(lse - largest).exp(), target_logits])
        dist.all_reduce(sums, group=self.group)
        return sums[0].log() + largest, sums[1]

    def add_gradients(self, weights: Tensor, grad_hidden: Tensor, grad_weight: Tensor | None) -> None:
        """Write the gradients of sum(weights * losses) to grad_hidden [n, H], and add them to grad_weight [V/T, H].

        grad_weight: None where the weight is not trained.
        """
        factors = (self.tile_lse - self.lse).exp_().mul_(weights)[..., None]
        minus = torch.where(self.has_target, -weights[:, None], 0).to(factors.dtype)
        grad_hidden.zero_()
        grad_weights = None if grad_weight is None else grad_weight.split(len(self.weights[0]))
        for tile, (softmax, weight) in enumerate(zip(self.softmaxes, self.weights, strict=True)):
            grad_logits = softmax.mul_(factors[tile]).scatter_add_(1, self.columns[tile], minus[tile])
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden.addmm_(grad_logits, weight)
            if grad_weights is not None:
                _add_matmul(grad_weights[tile], grad_logits.t(), self.hidden)


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to total, in place if all have one format."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
