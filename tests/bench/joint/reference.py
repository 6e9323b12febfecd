"""The straightforward formulation of the joint step: what it costs when nothing of its structure is used.

One dense mask over [noisy | clean], key and value heads repeated for every query head, logits of all rows, their cross
entropies, and only then the selection of the rows that count. Layers, trainer and results are those of our own step.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from conf.schema import Objective
from model.attention.plan import AttentionPlan
from model.attention.visibility import compute_dense_mask
from model.megatron.head import ScoredPositions
from model.megatron.tri_mode import TriModeModel
from pretrain.step.microbatches import PreparedStep
from tests.bench.joint.cases import Case, build_batch, build_step


@dataclass(frozen=True)
class DenseAttention:
    """Attention under a dense mask [1, 1, R, R], bool over both halves."""

    mask: Tensor

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend: query [B, H, R, D], key and value [B, G, R, D] -> [B, H, R, D]."""
        repeats = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=self.mask)


@dataclass(frozen=True)
class AllPositions(ScoredPositions):
    """Every position is scored; the masked noisy ones are selected afterwards. clean_tokens, masked [S]."""

    clean_tokens: Tensor
    masked: Tensor


class ReferenceModel(TriModeModel):
    """Our model with the head of the straightforward formulation. One sequence per batch."""

    def narrow(self, plan: AttentionPlan, scored: ScoredPositions, num_positions: int) -> AttentionPlan:
        """Return the plan itself: all positions go through all of every layer."""
        return plan

    def score(self, hidden: Tensor, scored: ScoredPositions, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        assert isinstance(scored, AllPositions)
        logits = self.output_layer(hidden)[:, 0].float()
        noisy, clean = logits.split(len(scored.clean_tokens))
        diffusion = cross_entropy(noisy, scored.clean_tokens, reduction="none")[scored.masked]
        ar = cross_entropy(clean[:-1], scored.clean_tokens[1:], reduction="none")
        losses = torch.cat([diffusion, ar])
        return (losses * scored.weights).sum(), losses.detach()


def build_reference_step(case: Case) -> PreparedStep:
    """Build the joint step of the same tokens, for ReferenceModel."""
    step, noisy = build_step(case, Objective.joint), build_batch(case)
    (microbatch,) = step.microbatches
    mask = compute_dense_mask(noisy.batch.layout, doubled=True)[:, None]
    scored = AllPositions(**vars(microbatch.scored), clean_tokens=noisy.batch.tokens[0], masked=noisy.masked[0])
    plan = replace(microbatch.plan, attend=DenseAttention(mask))
    return replace(step, microbatches=[replace(microbatch, plan=plan, scored=scored)])
