"""Compares greedy decodes whose arithmetic differs in the last bits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TIE = 1e-5  # AR's two best logits may swap when they are closer


@dataclass
class Comparison:
    """Counts the sequences compared, and those of them that parted at a near tie."""

    num_sequences: int = 0
    num_ties: int = 0

    @torch.no_grad()
    def add(self, model: Any, prompt: Tensor, expected: Tensor, got: Tensor) -> None:
        """Compare new tokens [T] after prompt [P]; AssertionError if they part elsewhere than at a near tie."""
        self.num_sequences += 1
        if torch.equal(expected, got):
            return
        length = min(len(expected), len(got))
        parted = (expected[:length] != got[:length]).nonzero()
        assert len(parted), f"one ends early: {len(expected)} and {len(got)} tokens"
        first = int(parted[0])
        logits = model(torch.cat((prompt, expected[:first]))[None]).logits[0, -1].double()
        logits[model.config.mask_token_id] = -torch.inf
        best = logits.topk(2)
        assert {int(expected[first]), int(got[first])} == set(best.indices.tolist()), "none of AR's two best"
        gap = float(best.values[0] - best.values[1])
        assert gap < TIE, f"new token {first} differs where the two best logits are {gap} apart"
        self.num_ties += 1
