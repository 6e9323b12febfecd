"""The cost of a draft: losses per drafted position, their weights, and the acceptance they aim at.

Shapes: M blocks, D drafted positions per block, V vocabulary. q is the drafter's distribution at a position, p the
verifier's at the same position given the true tokens before it.
Expected acceptance of one position under rejection sampling is sum min(p, q) = 1 - TV(p, q) (arXiv 2211.17192); greedy
decoding accepts a position if both choose the same token. A position is reached if all before it are accepted. So the
expected number of accepted tokens of a block is the sum over positions of the product of acceptances up to each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema.drafter import DraftLoss, DraftObjectiveConfig, PositionWeights
from lora.drafter.distributions import choose, compute_cross_entropy, compute_kl_divergence, compute_overlap, to_float
from lora.drafter.verified_objective import VerifiedDraft, compute_verified_loss

# Losses that are made of the acceptance itself; the others need no gradient of it.
USE_OVERLAP = (DraftLoss.tv, DraftLoss.hybrid, DraftLoss.expected_length)


@dataclass(frozen=True)
class DraftScore:
    """Loss and acceptance of one chunk of blocks.

    loss: [] sum over blocks; with gradient. accepted_greedy, accepted_sampled: [M] accepted tokens per block: counted
    under greedy decoding, expected under rejection sampling. matches: [M, D] bool, true where both choose the same
    token.
    """

    loss: Tensor
    accepted_greedy: Tensor
    accepted_sampled: Tensor
    matches: Tensor


def score_drafts(
    draft_logits: Tensor,
    verifier_logits: Tensor,
    targets: Tensor,
    scored: Tensor,
    config: DraftObjectiveConfig,
    verified: VerifiedDraft | None = None,
) -> DraftScore:
    """Compute loss and acceptance of drafted blocks.

    draft_logits, verifier_logits: [M, D, V], q and p before the softmax. targets: [M, D] true tokens. scored: [M, D]
    bool, from the first position on without gaps. verified: what the loss of this name judges, in place of the
    verifier's logits and the true tokens; acceptance is counted in the text whatever the loss.
    """
    log_q, log_p = to_float(draft_logits).log_softmax(-1), to_float(verifier_logits).log_softmax(-1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.loss in USE_OVERLAP):
        overlap = compute_overlap(log_p, log_q) * scored
    matches = (choose(draft_logits) == choose(verifier_logits)) & scored
    if config.loss is DraftLoss.verified:
        assert verified is not None, "the loss of a verified draft needs one"
        loss = compute_verified_loss(draft_logits, verified, scored, config.verified)
    elif config.loss is DraftLoss.expected_length:
        loss = (-overlap.cumprod(-1) * scored).sum()
    else:
        cost = _compute_cost(log_q, log_p, targets, overlap, config)
        loss = (cost * _compute_weights(overlap.detach(), config) * scored).sum()
    return DraftScore(
        loss=loss,
        accepted_greedy=matches.long().cumprod(-1).sum(-1),
        accepted_sampled=overlap.detach().cumprod(-1).sum(-1),
        matches=matches,
    )


def _compute_cost(
    log_q: Tensor, log_p: Tensor, targets: Tensor, overlap: Tensor, config: DraftObjectiveConfig
) -> Tensor:
    """Return [M, D]: the loss of each position by itself."""
    match config.loss:
        case DraftLoss.argmax:
            return compute_cross_entropy(log_q, choose(log_p))
        case DraftLoss.data:
            return compute_cross_entropy(log_q, targets)
        case DraftLoss.kl:
            return compute_kl_divergence(log_p, log_q)
        case DraftLoss.tv:
            return 1 - overlap
        case DraftLoss.hybrid:
            share = torch.exp(-config.hybrid_rate * overlap.detach())
            return share * compute_kl_divergence(log_p, log_q) + (1 - share) * (1 - overlap)
        case DraftLoss.expected_length | DraftLoss.verified:
            raise AssertionError("a block's loss, not a position's")


def _compute_weights(overlap: Tensor, config: DraftObjectiveConfig) -> Tensor:
    """Return [M, D]: how much each position counts."""
    if config.position_weights is PositionWeights.none:
        return torch.ones_like(overlap)
    before = overlap[:, :-1].clamp(min=config.reach_floor).cumprod(-1)
    return torch.cat([torch.ones_like(overlap[:, :1]), before], dim=1)
