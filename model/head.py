"""Vocabulary head and cross entropy on scored rows alone, in chunks, with gradients formed in the forward.

Full logits never exist: each chunk of rows makes its logits, its losses and its gradients, and is dropped. Forming
gradients at once costs no second head product and keeps one chunk of logits alive.
Shapes: N scored rows, H hidden size, V/T vocabulary rows of this tensor-parallel rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor


@dataclass(frozen=True)
class ScoredRows:
    """Which rows carry loss. rows [N]: index into the flattened [R, B] rows of a forward (row-major: r * B + b).

    targets [N] int64: token each row predicts. weights [N] fp32: factor of its cross entropy in the loss.
    """

    rows: Tensor
    targets: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> "ScoredRows":
        """The same rows on another device."""
        return ScoredRows(self.rows.to(device), self.targets.to(device), self.weights.to(device))


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
    ) -> tuple[Tensor, Tensor]:
        """hidden [N, H], weight [V/T, H] -> (loss, scalar fp32; cross entropy per row [N] fp32, no gradient)."""
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            losses[rows], grad_logits = _chunk(hidden[rows], weight, targets[rows], weights[rows], group)
            if grad_hidden is not None and grad_weight is not None:
                grad_logits = grad_logits.to(hidden.dtype)
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
                grad_weight += grad_logits.t() @ hidden[rows]
        ctx.group = group
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients formed in the forward; each rank's share of grad_hidden is summed over the group."""
        grad_hidden, grad_weight = ctx.saved_tensors
        if ctx.group.size() > 1:
            dist.all_reduce(grad_hidden, group=ctx.group)
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None, None, None


class VocabularyHead(ColumnParallelLinear):
    """The output layer: logits, or the loss of rows without ever holding their logits.

    Scoring goes through forward, so that megatron-core's hooks on a module's forward (which wait for overlapped
    parameter gathering) see the use of the weight.
    """

    def forward(  # type: ignore[override]
        self, hidden: Tensor, scored: ScoredRows | None = None, chunk_rows: int = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden [..., H] -> logits [..., V/T]; with `scored`, hidden [N, H] -> as ChunkedCrossEntropy.forward."""
        if scored is None:
            return super().forward(hidden)[0]
        return ChunkedCrossEntropy.apply(hidden, self.weight, scored.targets, scored.weights, chunk_rows, self.tp_group)


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Cross entropy [n] of a chunk and the gradient of its weighted sum by its logits [n, V/T], both fp32."""
    logits = (hidden @ weight.t()).float()
    largest = logits.amax(dim=-1)
    if group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    logits -= largest[:, None]
    local_targets = targets - group.rank() * len(weight)
    is_here = (local_targets >= 0) & (local_targets < len(weight))
    local_targets = local_targets.clamp(0, len(weight) - 1)[:, None]
    target_logits = logits.gather(1, local_targets)[:, 0] * is_here
    exponentials = logits.exp_()
    sums = torch.stack([exponentials.sum(dim=-1), target_logits])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    losses = sums[0].log() - sums[1]
    grad_logits = exponentials.mul_((weights / sums[0])[:, None])
    grad_logits.scatter_add_(1, local_targets, -(weights * is_here)[:, None])
    return losses, grad_logits
