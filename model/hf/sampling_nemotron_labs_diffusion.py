"""From logits to tokens: choosing, confidence, verification of drafts. Shapes: N rows of a batch, M drafted tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Draft:
    """Tokens proposed for the positions after a seed.

    tokens: [N, M]; the mask token's id where nothing is proposed, which verification never accepts.
    probabilities: [N, M, vocab], what each was drawn from, zero where nothing is proposed; None when greedy.
    confidence: [N, M] probability (at temperature 1) of the best token, zero where nothing is proposed; None: unknown.
    """

    tokens: Tensor
    probabilities: Tensor | None
    confidence: Tensor | None = None

    def cut(self, length: int) -> "Draft":
        """Its first `length` tokens."""
        return Draft(
            self.tokens[:, :length],
            None if self.probabilities is None else self.probabilities[:, :length],
            None if self.confidence is None else self.confidence[:, :length],
        )


@dataclass(frozen=True)
class Verdict:
    """tokens: [N, M + 1]; the first num_accepted + 1 of a row are to be emitted, the last of them the bonus token.
    num_accepted: [N], 0..M."""

    tokens: Tensor
    num_accepted: Tensor

    def bonus(self) -> Tensor:
        """[N, 1], the verifier's own token behind the accepted ones."""
        return self.tokens.gather(1, self.num_accepted[:, None])


def _widen(logits: Tensor) -> Tensor:
    """At least fp32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def compute_confidence(logits: Tensor, tokens: Tensor) -> Tensor:
    """Probability of tokens [...] under logits [..., vocab] at temperature 1."""
    wide = _widen(logits)
    return (wide.gather(-1, tokens[..., None])[..., 0] - wide.logsumexp(-1)).exp()


@dataclass(frozen=True)
class Sampler:
    """How a token is chosen from logits.

    temperature: 0 takes the best one. top_k, top_p: keep the k most probable tokens, then the fewest whose probability
    reaches p (at least one); None keeps all. generator: None is torch's global one.
    """

    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature == 0

    def choose(self, logits: Tensor) -> Tensor:
        """[..., vocab] -> [...]."""
        return logits.argmax(-1) if self.is_greedy else self.draw(self.compute_probabilities(logits))

    def compute_probabilities(self, logits: Tensor) -> Tensor:
        """Of every token [..., vocab], for a temperature above 0; without overflow at small ones."""
        wide = _widen(logits)
        wide = (wide - wide.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < wide.shape[-1]:
            wide = wide.masked_fill(wide < wide.topk(self.top_k).values[..., -1:], -torch.inf)
        probabilities = wide.softmax(-1)
        return probabilities if self.top_p in (None, 1.0) else _keep_nucleus(probabilities, self.top_p)

    def draw(self, probabilities: Tensor) -> Tensor:
        """One token per row of probabilities [..., vocab] -> [...]."""
        rows = probabilities.reshape(-1, probabilities.shape[-1])
        return torch.multinomial(rows, 1, generator=self.generator).view(probabilities.shape[:-1])

    def draft(self, logits: Tensor, *, with_confidence: bool) -> Draft:
        """Propose one token per row of logits [N, M, vocab]."""
        best = logits.argmax(-1)
        confidence = compute_confidence(logits, best) if with_confidence else None
        if self.is_greedy:
            return Draft(best, None, confidence)
        probabilities = self.compute_probabilities(logits)
        return Draft(self.draw(probabilities), probabilities, confidence)

    def verify(self, draft: Draft, logits: Tensor) -> Verdict:
        """Judge a draft by the verifier's logits [N, M + 1, vocab], row i of which predicts drafted token i.

        Greedy: the longest prefix that equals the verifier's choices. With a temperature: rejection sampling
        (arXiv 2211.17192), which emits tokens distributed exactly as the verifier's own.
        """
        if draft.probabilities is None:
            choices = logits.argmax(-1)
            return Verdict(choices, _count_leading(draft.tokens == choices[:, :-1]))
        return self._verify_by_rejection(draft.tokens, draft.probabilities, self.compute_probabilities(logits))

    def _verify_by_rejection(self, tokens: Tensor, drafter: Tensor, verifier: Tensor) -> Verdict:
        """Accept token x with probability min(1, p(x) / q(x)); at the first rejection draw from max(p - q, 0).

        tokens [N, M], drafter q [N, M, vocab], verifier p [N, M + 1, vocab].
        """
        p = verifier[:, :-1].gather(-1, tokens[..., None])[..., 0]
        q = drafter.gather(-1, tokens[..., None])[..., 0]
        chance = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=self.generator)
        num_accepted = _count_leading(chance * q < p)
        rows = torch.arange(len(tokens), device=tokens.device)
        # Behind the last drafted token q is zero, so that the bonus there is drawn from p itself.
        p_next, q_next = verifier[rows, num_accepted], pad(drafter, (0, 0, 0, 1))[rows, num_accepted]
        residual = (p_next - q_next).clamp(min=0)
        # p == q leaves nothing but rounding; a rejection is then an event of probability zero, and p serves.
        bonus = self.draw(torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next))
        return Verdict(pad(tokens, (0, 1)).scatter(1, num_accepted[:, None], bonus[:, None]), num_accepted)


def _keep_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The fewest tokens of each row [..., vocab] whose probability reaches top_p, renormalised."""
    ordered, order = probabilities.sort(-1, descending=True)
    kept = ordered.cumsum(-1) - ordered < top_p  # what precedes a token has not reached it yet
    ordered = ordered.where(kept, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, ordered / ordered.sum(-1, keepdim=True))


def _count_leading(accepted: Tensor) -> Tensor:
    """Number of trues before the first false in each row of [N, M]."""
    return accepted.long().cumprod(-1).sum(-1)
