"""The cost of a draft that was verified: the technical report's objective of the draft adapter (section 3.3).

    drafter's logits --> a draft, sampled or greedy --> the verifier's logits on it --> where decoding would look
        --> per position: matching term and cross entropy, on the tokens that either model finds likely

Shapes: M blocks, D drafted positions per block, V vocabulary, U tokens of a support. q is the drafter's distribution at
a position, p the verifier's (frozen) after the drafted tokens before it.
A position is active if every drafted token before it was accepted, which means that it is the verifier's own choice. So
all that is read before an active position is the verifier's greedy text: where the batch holds that text, its clean
pass gives the logits of every active position, and nothing needs to be verified again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema.drafter import VerifiedDraftConfig, VerifiedPositions
from lora.drafter.distributions import (
    choose,
    compute_kl_divergence,
    compute_overlap,
    restrict_to_likely,
    sample,
    to_float,
)


@dataclass(frozen=True)
class VerifiedDraft:
    """A draft, and what the verifier says of it.

    tokens: [M, D] int64, the draft. read: [M, D] int64, what the verifier read there: the draft itself, or the tokens
    of a text. logits: [M, D, V], those that judge each drafted token.
    """

    tokens: Tensor
    read: Tensor
    logits: Tensor


def draw_drafts(logits: Tensor, draws: Tensor, config: VerifiedDraftConfig) -> Tensor:
    """Draw the drafts [M, D] of blocks: sampled in a share of them, greedy in the others.

    logits: [M, D, V]. draws: [M, 1 + D], uniform in [0, 1): whether the block is sampled, and every position's own.
    """
    sampled = sample(to_float(logits) / config.draft_temperature, draws[:, 1:])
    return torch.where(draws[:, :1] < config.sampled_share, sampled, choose(logits))


def compute_verified_loss(
    draft_logits: Tensor, draft: VerifiedDraft, scored: Tensor, config: VerifiedDraftConfig
) -> Tensor:
    """Compute the loss [], the sum over blocks of the mean over their positions that count.

    draft_logits: [M, D, V], with gradient. scored: [M, D] bool, from the first position on without gaps.
    """
    counts = find_active(draft, scored) if config.positions is VerifiedPositions.active else scored
    draft_logits, verifier_logits = to_float(draft_logits), to_float(draft.logits)
    q, p = restrict_to_likely(draft_logits, verifier_logits, config.support)
    # The verifier's choice is the likeliest of its own tokens, so that every support holds it.
    wanted = draft_logits.gather(-1, choose(verifier_logits)[..., None])[..., 0]
    cross_entropy = (q / config.argmax_temperature).logsumexp(-1) - wanted / config.argmax_temperature
    cost = config.matching_weight * _compute_matching(p, q, config) + config.argmax_weight * cross_entropy
    return ((cost * counts).sum(-1) / counts.sum(-1).clamp(min=1)).sum()


def find_active(draft: VerifiedDraft, scored: Tensor) -> Tensor:
    """Return [M, D] bool: the accepted positions and the first rejected one, as far as they are scored.

    A token of the text that is not the verifier's choice ends them like a rejection: what follows read another text.
    """
    accepted = (draft.tokens == choose(draft.logits)) & (draft.tokens == draft.read)
    reached = torch.cat([torch.ones_like(accepted[:, :1]), accepted[:, :-1]], dim=1).long().cumprod(-1).bool()
    return reached & scored


def _compute_matching(p: Tensor, q: Tensor, config: VerifiedDraftConfig) -> Tensor:
    """Return [M, D]: w KL(p || q) + (1 - w) (1 - sum min(p, q)) of logits [M, D, U]; w falls as acceptance rises."""
    log_p, log_q = ((logits / config.matching_temperature).log_softmax(-1) for logits in (p, q))
    overlap = compute_overlap(log_p, log_q)
    share = torch.exp(-config.matching_rate * overlap.detach())
    return share * compute_kl_divergence(log_p, log_q) + (1 - share) * (1 - overlap)
