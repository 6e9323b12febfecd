"""From logits to tokens: choosing, confidence, verification of drafts. Shapes: N rows of a batch, M drafted tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Draft:
    """Tokens proposed for the positions after a seed.

    tokens: [N, M]. probabilities: [N, M, vocab], what each was drawn from; None when greedy.
    """

    tokens: Tensor
    probabilities: Tensor | None


@dataclass(frozen=True)
class Verdict:
    """tokens: [N, M + 1]; the first num_accepted + 1 of a row are to be emitted, the last of them the bonus token.
    num_accepted: [N], 0..M."""

    tokens: Tensor
    num_accepted: Tensor


def _widen(logits: Tensor) -> Tensor:
    """At least fp32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def compute_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softmax of logits [..., vocab] / temperature (> 0), without overflow at small temperatures."""
    wide = _widen(logits)
    return ((wide - wide.amax(-1, keepdim=True)) / temperature).softmax(-1)


def draw(probabilities: Tensor) -> Tensor:
    """One token per row of probabilities [..., vocab] -> [...]."""
    vocab_size = probabilities.shape[-1]
    return torch.multinomial(probabilities.reshape(-1, vocab_size), 1).view(probabilities.shape[:-1])


def choose_tokens(logits: Tensor, temperature: float) -> Tensor:
    """[..., vocab] -> [...]: the best token, or one drawn at `temperature` > 0."""
    if temperature == 0:
        return logits.argmax(-1)
    return draw(compute_probabilities(logits, temperature))


def compute_confidence(logits: Tensor, tokens: Tensor) -> Tensor:
    """Probability of tokens [...] under logits [..., vocab] at temperature 1."""
    wide = _widen(logits)
    return (wide.gather(-1, tokens[..., None])[..., 0] - wide.logsumexp(-1)).exp()


def verify(draft: Draft, logits: Tensor, temperature: float) -> Verdict:
    """Judge a draft by the verifier's logits [N, M + 1, vocab], row i of which predicts drafted token i.

    Greedy: the longest prefix that equals the verifier's choices. With a temperature: rejection sampling
    (arXiv 2211.17192), which emits tokens distributed exactly as the verifier's own.
    """
    if draft.probabilities is None:
        choices = logits.argmax(-1)
        return Verdict(choices, _count_leading(draft.tokens == choices[:, :-1]))
    return _verify_by_rejection(draft.tokens, draft.probabilities, compute_probabilities(logits, temperature))


def _count_leading(accepted: Tensor) -> Tensor:
    """Number of trues before the first false in each row of [N, M]."""
    return accepted.long().cumprod(-1).sum(-1)


def _verify_by_rejection(tokens: Tensor, drafter: Tensor, verifier: Tensor) -> Verdict:
    """Accept token x with probability min(1, p(x) / q(x)); at the first rejection draw from max(p - q, 0).

    tokens [N, M], drafter q [N, M, vocab], verifier p [N, M + 1, vocab].
    """
    p = verifier[:, :-1].gather(-1, tokens[..., None])[..., 0]
    q = drafter.gather(-1, tokens[..., None])[..., 0]
    num_accepted = _count_leading(torch.rand_like(p) * q < p)
    rows = torch.arange(len(tokens), device=tokens.device)
    # Behind the last drafted token q is zero, so that the bonus there is drawn from p itself.
    p_next, q_next = verifier[rows, num_accepted], pad(drafter, (0, 0, 0, 1))[rows, num_accepted]
    residual = (p_next - q_next).clamp(min=0)
    # p == q leaves nothing but rounding; a rejection is then an event of probability zero, and p serves.
    bonus = draw(torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next))
    return Verdict(pad(tokens, (0, 1)).scatter(1, num_accepted[:, None], bonus[:, None]), num_accepted)
