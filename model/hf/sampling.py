"""From logits to tokens: choosing, confidence, verification of drafts, the thinking budget.

Shapes: B sequences, M drafted tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

NOT_THINKING = -1
NO_TOKEN = -1
LARGEST_BUDGET = 1 << 40  # beyond every context, and small enough to be counted in int64


@dataclass(frozen=True)
class Draft:
    """Tokens proposed for the positions after a seed.

    Attributes:
        tokens: [B, M]; the mask token's id where nothing is proposed, which verification never accepts.
        probabilities: [B, M, vocab], what each was drawn from, zero where nothing is proposed; None when greedy.
        confidence: [B, M] probability (at temperature 1) of the best token, zero where nothing is proposed; None if it
            was not computed.
    """

    tokens: Tensor
    probabilities: Tensor | None
    confidence: Tensor | None = None

    def cut(self, length: int) -> "Draft":
        """Return the draft's first `length` tokens."""
        return Draft(
            self.tokens[:, :length],
            None if self.probabilities is None else self.probabilities[:, :length],
            None if self.confidence is None else self.confidence[:, :length],
        )

    def withdraw(self, where: Tensor, mask_token_id: int) -> "Draft":
        """Return the draft with nothing proposed at `where` [B, M]."""
        return Draft(
            self.tokens.masked_fill(where, mask_token_id),
            None if self.probabilities is None else self.probabilities.masked_fill(where[..., None], 0.0),
            None if self.confidence is None else self.confidence.masked_fill(where, 0.0),
        )


@dataclass(frozen=True)
class DraftVerification:
    """The tokens to emit after a draft was verified.

    Attributes:
        tokens: [B, M + 1]; the first num_accepted + 1 of a sequence are emitted, the last of them the bonus token.
        num_accepted: [B], 0..M.
    """

    tokens: Tensor
    num_accepted: Tensor

    def bonus(self) -> Tensor:
        """Return the verifier's own token after the accepted ones, [B, 1]."""
        return self.tokens.gather(1, self.num_accepted[:, None])


def _widen(logits: Tensor) -> Tensor:
    """Return the logits in fp32, or as they are in float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def compute_confidence(logits: Tensor, tokens: Tensor) -> Tensor:
    """Compute the probability of tokens [...] under logits [..., vocab] at temperature 1."""
    wide = _widen(logits)
    return (wide.gather(-1, tokens[..., None])[..., 0] - wide.logsumexp(-1)).exp()


def mix_verifiers(ar_logits: Tensor, diffusion_logits: Tensor, weight: float) -> Tensor:
    """Compute the logits of weight * p_AR + (1 - weight) * p_diffusion at temperature 1; all are [..., vocab]."""
    if weight == 0:
        return diffusion_logits
    ar, diffusion = _widen(ar_logits).log_softmax(-1), _widen(diffusion_logits).log_softmax(-1)
    return torch.logaddexp(ar + math.log(weight), diffusion + math.log1p(-weight))


def make_generator(seed: int | None, device: torch.device) -> torch.Generator | None:
    """Return a generator on `device` seeded with `seed`; for None return None, torch's global generator."""
    return None if seed is None else torch.Generator(device).manual_seed(seed)


def resolve_temperature(temperature: float | None, do_sample: bool | None) -> float:
    """Return the temperature that both arguments mean; raise ValueError if they contradict each other."""
    if temperature is None:
        return float(bool(do_sample))
    if do_sample is not None and do_sample != (temperature > 0):
        remedy = "give a temperature above 0" if do_sample else "leave temperature out"
        raise ValueError(
            f"do_sample={do_sample} contradicts temperature={temperature}: {remedy}, or leave do_sample out"
        )
    return temperature


@dataclass(frozen=True)
class Sampler:
    """The rule by which tokens are chosen from logits.

    Attributes:
        temperature: 0 takes the most probable token.
        top_k: sample from the k most probable tokens; None from all.
        top_p: then from the fewest whose probability reaches p, at least one; None from all.
        generator: of the random numbers; None is torch's global one.
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
        """Choose one token for each of logits [..., vocab] -> [...]."""
        return logits.argmax(-1) if self.is_greedy else self.draw(self.compute_probabilities(logits))

    def compute_probabilities(self, logits: Tensor) -> Tensor:
        """Compute the probability of every token [..., vocab] for a temperature above 0; low ones do not overflow."""
        wide = _widen(logits)
        wide = (wide - wide.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < wide.shape[-1]:
            wide = wide.masked_fill(wide < wide.topk(self.top_k).values[..., -1:], -torch.inf)
        probabilities = wide.softmax(-1)
        return probabilities if self.top_p in (None, 1.0) else _truncate_to_nucleus(probabilities, self.top_p)

    def draw(self, probabilities: Tensor) -> Tensor:
        """Draw one token from each of probabilities [..., vocab] -> [...]."""
        flat = probabilities.reshape(-1, probabilities.shape[-1])
        return torch.multinomial(flat, 1, generator=self.generator).view(probabilities.shape[:-1])

    def draft(self, logits: Tensor, *, with_confidence: bool) -> Draft:
        """Propose one token for each of logits [B, M, vocab]."""
        best = logits.argmax(-1)
        confidence = compute_confidence(logits, best) if with_confidence else None
        if self.is_greedy:
            return Draft(best, None, confidence)
        probabilities = self.compute_probabilities(logits)
        return Draft(self.draw(probabilities), probabilities, confidence)

    def verify(self, draft: Draft, logits: Tensor) -> DraftVerification:
        """Verify a draft by the verifier's logits [B, M + 1, vocab], of which the i-th predict drafted token i.

        Greedy decoding accepts the longest prefix that equals the verifier's choices. With a temperature, rejection
        sampling (arXiv 2211.17192) emits tokens distributed exactly as the verifier's own.
        """
        if draft.probabilities is None:
            choices = logits.argmax(-1)
            return DraftVerification(choices, _count_leading(draft.tokens == choices[:, :-1]))
        return self._verify_by_rejection(draft.tokens, draft.probabilities, self.compute_probabilities(logits))

    def _verify_by_rejection(self, tokens: Tensor, drafter: Tensor, verifier: Tensor) -> DraftVerification:
        """Accept token x with probability min(1, p(x) / q(x)); at the first rejection draw from max(p - q, 0).

        tokens [B, M], drafter q [B, M, vocab], verifier p [B, M + 1, vocab].
        """
        p = verifier[:, :-1].gather(-1, tokens[..., None])[..., 0]
        q = drafter.gather(-1, tokens[..., None])[..., 0]
        chance = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=self.generator)
        num_accepted = _count_leading(chance * q < p)
        batch = torch.arange(len(tokens), device=tokens.device)
        # After the last drafted token q is zero, so that the bonus there is drawn from p itself.
        p_next, q_next = verifier[batch, num_accepted], pad(drafter, (0, 0, 0, 1))[batch, num_accepted]
        residual = (p_next - q_next).clamp(min=0)
        # p == q leaves nothing but rounding; a rejection is then an event of probability zero, and p serves.
        bonus = self.draw(torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next))
        return DraftVerification(pad(tokens, (0, 1)).scatter(1, num_accepted[:, None], bonus[:, None]), num_accepted)


def _truncate_to_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Set all but the fewest tokens of [..., vocab] whose probability reaches top_p to zero, and renormalise."""
    ordered, order = probabilities.sort(-1, descending=True)
    in_nucleus = ordered.cumsum(-1) - ordered < top_p  # the tokens before this one have not reached it yet
    ordered = ordered.where(in_nucleus, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, ordered / ordered.sum(-1, keepdim=True))


def _count_leading(accepted: Tensor) -> Tensor:
    """Count the trues before the first false in each line of [B, M]."""
    return accepted.long().cumprod(-1).sum(-1)


class ThinkingBudget:
    """Forces </think> once a sequence has spent its budget of thinking tokens; does nothing without a budget.

    It changes the verifier's logits, so speculation under a budget still equals AR under that budget.
    """

    def __init__(self, budget: int | None, open_id: int | None, close_id: int, tokens: Tensor, lengths: list[int]):
        """Read the prompts.

        Args:
            budget: tokens of a thought before </think>; None is no limit.
            open_id: id of <think>. None: the first new token begins a thought, and none follows it. That is the rule of
                the released models, where block diffusion also writes </think> down before it denoises its block.
            close_id: id of </think>.
            tokens: [B, P], the prompts, whose thoughts go on.
            lengths: how many tokens of each prompt count, from its first one.
        """
        self._budget = None if budget is None else min(budget, LARGEST_BUDGET)
        self._open_id = NO_TOKEN if open_id is None else open_id
        self.close_id = close_id
        self._spent = tokens.new_full((len(tokens), 1), NOT_THINKING)
        self.commit(tokens, torch.tensor(lengths, device=tokens.device))
        if open_id is None:
            self._spent = torch.zeros_like(self._spent)

    def force(self, logits: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Leave only </think> in the logits wherever the budget is spent; change them in place and return them.

        logits [B, 1 + M, vocab] predict the tokens that follow the last committed token and `tokens` [B, M] after it.
        """
        if self._budget is None:
            return logits
        spent = self._spent if tokens is None else torch.cat((self._spent, self._count(tokens)), dim=1)
        is_over = spent >= self._budget
        logits.masked_fill_(is_over[..., None], -torch.inf)
        logits[..., self.close_id].masked_fill_(is_over, 0.0)
        return logits

    def commit(self, tokens: Tensor, counts: Tensor | None = None) -> None:
        """Take the first `counts` [B] of tokens [B, N] as final; None: all of them."""
        if self._budget is None:
            return
        spent = torch.cat((self._spent, self._count(tokens)), dim=1)
        last = spent.new_full((len(spent),), tokens.shape[1]) if counts is None else counts
        self._spent = spent.gather(1, last[:, None])

    def find_close(self, num_tokens: int) -> Tensor:
        """Find where among the next num_tokens tokens </think> stands before they are decoded: bool [B, num_tokens]."""
        index = torch.arange(num_tokens, device=self._spent.device).expand(len(self._spent), -1)
        if self._budget is None or self._open_id != NO_TOKEN:
            return torch.zeros_like(index, dtype=torch.bool)
        return (self._spent >= 0) & (self._spent + index == self._budget)

    def find_overrun(self, tokens: Tensor) -> Tensor:
        """Find the first of tokens [B, N], not committed yet, that had to be </think> and is another one: bool [B, N].

        No more than one position of a sequence is true.
        """
        if self._budget is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        before = torch.cat((self._spent, self._count(tokens)[:, :-1]), dim=1)
        is_over = (before >= self._budget) & (tokens != self.close_id)
        return is_over & (is_over.cumsum(1) == 1)

    @property
    def has_limit(self) -> bool:
        """Whether there is a budget at all."""
        return self._budget is not None

    def _count(self, tokens: Tensor) -> Tensor:
        """Count the tokens of thinking [B, N] up to and including each of `tokens`, which follow the committed ones."""
        if tokens.shape[1] == 0:
            return tokens
        index = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).expand_as(tokens)
        opens, closes = tokens == self._open_id, tokens == self.close_id
        closed = index.where(closes, 0).cummax(1).values
        # Inside a thought <think> is a token like any other: only the first one after a </think> opens.
        num_opens = opens.cumsum(1)
        is_first = num_opens == num_opens.where(closes, 0).cummax(1).values + 1
        opened = index.where(opens & is_first, 0).cummax(1).values
        inside = (index - opened).where(opened > closed, NOT_THINKING)
        return torch.where((self._spent >= 0) & (closed == 0), self._spent + index, inside)
