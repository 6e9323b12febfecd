"""A budget for thinking: how many tokens may stand between <think> and </think> before the latter is forced."""

import torch
from torch import Tensor

NOT_THINKING = -1


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
