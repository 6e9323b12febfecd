"""From logits to tokens: choosing, confidence, verification of drafts. Shapes: N rows of a batch, M drafted tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

NOT_THINKING = -1


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


class ThinkingBudget:
    """Follows each row of a decode and forces </think> when its budget is spent; does nothing without a budget.

    It changes the verifier's logits, so every mode keeps the same rule: AR under the budget is what speculation equals.
    """

    def __init__(self, budget: int | None, think_token_ids: tuple[int, int], tokens: Tensor, lengths: list[int]):
        """budget: tokens; None is no limit. think_token_ids: of <think> and </think>.

        tokens: [B, P], the prompts; the first `lengths` of each row count.
        """
        self._budget = budget
        self._open_id, self._close_id = think_token_ids
        self._spent = tokens.new_full((len(tokens), 1), NOT_THINKING)
        self.keep(tokens, torch.tensor(lengths, device=tokens.device))

    def force(self, logits: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits [B, 1 + M, vocab] that predict what follows the last kept token and `tokens` [B, M] behind it.

        Changed in place, and returned.
        """
        if self._budget is None:
            return logits
        spent = self._spent if tokens is None else torch.cat((self._spent, self._count(tokens)), dim=1)
        is_over = spent >= self._budget
        logits.masked_fill_(is_over[..., None], -torch.inf)
        logits[..., self._close_id].masked_fill_(is_over, 0.0)
        return logits

    def keep(self, tokens: Tensor, counts: Tensor | None = None) -> None:
        """Of tokens [B, N] the first `counts` [B] of each row are final; None: all."""
        if self._budget is None:
            return
        spent = torch.cat((self._spent, self._count(tokens)), dim=1)
        last = spent.new_full((len(spent),), tokens.shape[1]) if counts is None else counts
        self._spent = spent.gather(1, last[:, None])

    def find_overrun(self, tokens: Tensor) -> Tensor:
        """Bool [B, N]: positions of tokens behind the last kept one that had to be </think> and are something else.

        Only the first of a row is meaningful: it changes what follows.
        """
        if self._budget is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        before = torch.cat((self._spent, self._count(tokens)[:, :-1]), dim=1)
        return (before >= self._budget) & (tokens != self._close_id)

    @property
    def close_id(self) -> int:
        """The id of </think>."""
        return self._close_id

    def _count(self, tokens: Tensor) -> Tensor:
        """[B, N]: tokens of thinking up to and including each of `tokens`, which follow the last kept one."""
        if tokens.shape[1] == 0:
            return tokens
        index = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).expand_as(tokens)
        opens, closes = tokens == self._open_id, tokens == self._close_id
        closed = index.where(closes, 0).cummax(1).values
        # Inside a thought <think> is a token like any other: only the first one behind a </think> opens.
        num_opens = opens.cumsum(1)
        is_first = num_opens == num_opens.where(closes, 0).cummax(1).values + 1
        opened = index.where(opens & is_first, 0).cummax(1).values
        inside = (index - opened).where(opened > closed, NOT_THINKING)
        return torch.where((self._spent >= 0) & (closed == 0), self._spent + index, inside)


def make_generator(seed: int | None, device: torch.device) -> torch.Generator | None:
    """A generator on `device` seeded with `seed`; None (torch's global one) for None."""
    return None if seed is None else torch.Generator(device).manual_seed(seed)
