"""Sums of a step's cross entropies and the losses read off them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.objective.rows import RowSelection, StepCounts

NUM_SUMS = 4  # optimised loss, AR, diffusion, masked


def compute_loss_sums(loss: Tensor, cross_entropy: Tensor, selection: RowSelection) -> Tensor:
    """[loss, sum CE of clean rows, sum CE/p of noisy rows, sum CE of noisy rows], fp64, on the losses' device."""
    cross_entropy = cross_entropy.detach().double()
    is_noisy = selection.is_noisy.to(cross_entropy.device)
    noisy = cross_entropy * is_noisy
    inverse_p = selection.inverse_p.to(cross_entropy.device)
    return torch.stack(
        [loss.detach().double(), cross_entropy.sum() - noisy.sum(), (noisy * inverse_p).sum(), noisy.sum()]
    )


@dataclass(frozen=True)
class LossStats:
    """Losses of a global batch, in nats. None where the objective has no such term.

    loss: what is optimised. ar_loss: mean over scored clean rows. diffusion_loss: sum(CE/p) over the tokens that could
    have been masked, an upper bound per token. masked_ce: mean over masked tokens. masking_ratio: masked / maskable.
    """

    loss: float
    ar_loss: float
    diffusion_loss: float | None
    masked_ce: float | None
    masking_ratio: float | None

    @classmethod
    def from_sums(cls, sums: Tensor, counts: StepCounts, is_joint: bool) -> "LossStats":
        """sums [NUM_SUMS] and counts over the same rows."""
        loss, ar_sum, diffusion_sum, masked_sum = sums.tolist()
        return cls(
            loss=loss,
            ar_loss=ar_sum / max(counts.clean, 1),
            diffusion_loss=diffusion_sum / max(counts.maskable, 1) if is_joint else None,
            masked_ce=masked_sum / max(counts.masked, 1) if is_joint else None,
            masking_ratio=counts.masked / max(counts.maskable, 1) if is_joint else None,
        )
