"""Apply a stage's objective to a batch, before it is planned and weighed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import Objective
from data_pipeline.batch import SequenceLayout
from data_pipeline.noise import NoisyBatch
from model.megatron.head import ScoredPositions
from pretrain.objective.scoring import StepCounts, count_step, score_ar, score_joint


@dataclass(frozen=True)
class ObjectiveInput:
    """Tokens [B, R] of a forward, what they belong to, what of them is scored, and the counts of this batch alone."""

    tokens: Tensor
    layout: SequenceLayout
    doubled: bool
    scored: ScoredPositions
    counts: StepCounts


def apply_objective(noisy: NoisyBatch, objective: Objective) -> ObjectiveInput:
    """Build the input of a whole forward, in which no noisy block is left out."""
    doubled = objective is Objective.joint
    tokens = noisy.doubled_tokens if doubled else noisy.batch.tokens
    scored = score_joint(noisy) if doubled else score_ar(noisy.batch)
    counts = count_step(noisy.batch, scored, noisy.is_live if doubled else None, tokens.numel())
    return ObjectiveInput(tokens, noisy.batch.layout, doubled, scored, counts)


def score_positions(positions: Tensor, targets: Tensor, weights: Tensor) -> ScoredPositions:
    """Return clean positions with these targets and weights."""
    text = torch.ones_like(positions, dtype=torch.bool)
    return ScoredPositions(positions, targets, weights, torch.ones_like(weights), ~text, text)
