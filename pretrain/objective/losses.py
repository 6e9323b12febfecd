"""Weigh cross entropies into the loss, and compute the losses that are logged.

With CE the cross entropy of a scored position, p the probability by which a noisy one was masked, alpha =
stage.diffusion_weight, and sums and counts over the whole global batch:

    loss = ar_term + diffusion_term

    stage.loss_normalization   ar_term                               diffusion_term
    global_average             sum_clean CE / (N_clean + N_masked)   alpha * sum_noisy CE/p / (N_clean + N_masked)
    per_objective              sum_clean CE / N_clean                alpha * sum_noisy CE/p / N_masked

N_clean counts scored clean positions, N_masked scored noisy ones (all of which are masked). Logged beside them:

    ar_loss             = sum_clean CE / N_clean
    diffusion_loss      = sum_noisy CE/p / N_maskable, an upper bound in nats per token that could have been masked
    diffusion_text_loss = the same over text alone, without block padding: this one compares with ar_loss

About half of the tokens that could be masked are. So relative to ar_loss, diffusion_loss counts alpha times under
global_average, but about 2 * alpha times under per_objective.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from conf.schema import LossNormalization, Objective, StageConfig
from model.megatron.head import ScoredPositions
from pretrain.objective.scoring import StepCounts

NUM_SUMS = 5  # see compute_loss_sums
NUM_COUNTS = len(fields(StepCounts))


def choose_denominators(counts: StepCounts, stage: StageConfig) -> tuple[Any, Any]:
    """Return what the clean and the noisy sum are divided by; counts: of the whole global batch.

    Numbers, or tensors [] where the counts are on a device.
    """
    if stage.loss_normalization is LossNormalization.global_average:
        scored = _at_least_one(counts.clean + counts.masked)
        return scored, scored
    return _at_least_one(counts.clean), _at_least_one(counts.masked)


def _at_least_one(count: Any) -> Any:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def weigh(scored: ScoredPositions, counts: StepCounts, stage: StageConfig) -> ScoredPositions:
    """Fill in the weights by which cross entropies, over all microbatches and ranks, sum to the loss.

    counts: of the whole global batch; on the device of `scored` the host need not know them.
    """
    clean, noisy = choose_denominators(counts, stage)
    noisy_weight = stage.diffusion_weight * scored.inverse_p / noisy
    clean_weight = torch.ones_like(scored.inverse_p) / clean
    return replace(scored, weights=torch.where(scored.is_noisy, noisy_weight, clean_weight))


def compute_loss_sums(loss: Tensor, cross_entropy: Tensor, scored: ScoredPositions) -> Tensor:
    """Return [loss, sum CE of clean, sum CE/p of noisy, sum CE/p of noisy text, sum CE of noisy positions], fp64."""
    cross_entropy = cross_entropy.detach().double()
    noisy = cross_entropy * scored.is_noisy
    bound = noisy * scored.inverse_p
    return torch.stack(
        [
            loss.detach().double(),
            cross_entropy.sum() - noisy.sum(),
            bound.sum(),
            (bound * scored.is_text).sum(),
            noisy.sum(),
        ]
    )


@dataclass(frozen=True)
class LossStats:
    """Losses of a global batch, in nats; None where the objective has no such term. The module has the formulas.

    loss: what is optimised, ar_term + diffusion_term. masked_ce: mean cross entropy of masked tokens.
    masking_ratio: masked / maskable tokens.
    """

    loss: float
    ar_term: float
    diffusion_term: float | None
    ar_loss: float
    diffusion_loss: float | None
    diffusion_text_loss: float | None
    masked_ce: float | None
    masking_ratio: float | None

    @classmethod
    def from_sums(cls, sums: Sequence[float], counts: StepCounts, stage: StageConfig) -> "LossStats":
        """Divide NUM_SUMS sums by counts over the same positions, those of the whole global batch."""
        loss, ar_sum, diffusion_sum, text_sum, masked_sum = sums
        clean, noisy = choose_denominators(counts, stage)
        is_joint = stage.objective is Objective.joint
        return cls(
            loss=loss,
            ar_term=ar_sum / clean,
            diffusion_term=stage.diffusion_weight * diffusion_sum / noisy if is_joint else None,
            ar_loss=ar_sum / max(counts.clean, 1),
            diffusion_loss=diffusion_sum / max(counts.maskable, 1) if is_joint else None,
            diffusion_text_loss=text_sum / max(counts.text, 1) if is_joint else None,
            masked_ce=masked_sum / max(counts.masked, 1) if is_joint else None,
            masking_ratio=counts.masked / max(counts.maskable, 1) if is_joint else None,
        )


@dataclass(frozen=True)
class StepNumbers:
    """Holds what the host learns of a step: loss sums (see compute_loss_sums), counts, and the norm of the gradients.

    All of it is queued on the device without waiting, so that the host waits once, in the exchange of heartbeats.
    """

    sums: list[float]
    counts: StepCounts
    grad_norm: float

    @property
    def loss(self) -> float:
        """The loss of the step."""
        return self.sums[0]

    @classmethod
    def of(cls, values: Sequence[float]) -> "StepNumbers":
        """Take apart what join_numbers joined, once it is on the host."""
        counts = StepCounts(*(int(value) for value in values[NUM_SUMS : NUM_SUMS + NUM_COUNTS]))
        return cls(list(values[:NUM_SUMS]), counts, values[-1])


def join_numbers(sums: Tensor, counts: StepCounts, grad_norm: Tensor) -> Tensor:
    """Return all numbers of a step [K] in fp64 on their device; counts: tensors [] there. grad_norm: [1]."""
    return torch.cat([sums, torch.stack(astuple(counts)).double(), grad_norm.double()])
