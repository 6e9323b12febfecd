"""A tiny model that has learnt something, so that drafts are often right and sometimes wrong."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

BLOCK, LENGTH, VOCAB, MASK = 8, 24, 40, 39
FIRST, LAST = 14, 38  # ids of ordinary tokens; below: eos, <think> and others


def make_periodic(num_sequences: int, length: int, generator: torch.Generator) -> Tensor:
    """Make [num_sequences, length] int64: repeated random patterns of 2 to 5 tokens, with an odd token now and then."""
    sequences = []
    for _ in range(num_sequences):
        period = int(torch.randint(2, 6, (), generator=generator))
        pattern = torch.randint(FIRST, LAST, (period,), generator=generator)
        sequences.append(pattern.repeat(length // period + 1)[:length])
    tokens = torch.stack(sequences)
    noise = torch.rand(tokens.shape, generator=generator) < 0.03
    return torch.where(noise, torch.randint(FIRST, LAST, tokens.shape, generator=generator), tokens)


def _joint_loss(model: Any, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Return the loss of a causal prefix's next tokens plus that of masked tokens of a bidirectional block after it."""
    start = int(torch.randint(6, LENGTH - BLOCK, (), generator=generator))
    index = torch.arange(start + BLOCK)
    visible = (index[None] <= index[:, None]) | (index[:, None] >= start)
    inputs = tokens[:, : start + BLOCK].clone()
    masked = torch.rand(len(tokens), BLOCK, generator=generator) < 0.8
    masked[:, 0] &= torch.rand(len(tokens), generator=generator) < 0.5  # both kinds of blocks: after a seed, or not
    inputs[:, start:][masked] = MASK
    logits = model(inputs, attention_mask=visible[None, None]).logits
    following = cross_entropy(logits[:, : start - 1].flatten(0, 1), tokens[:, 1:start].flatten())
    return following + cross_entropy(logits[:, start:][masked], tokens[:, start : start + BLOCK][masked])


@cache
def _train(make_model: Any, num_steps: int) -> dict[str, Tensor]:
    model = make_model(torch.float32, **CONFIG)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (num_steps - step) / num_steps * 1.5)
        optimizer.zero_grad()
        _joint_loss(model, make_periodic(32, LENGTH, generator), generator).backward()
        optimizer.step()
    return model.state_dict()


CONFIG = {
    "vocab_size": VOCAB,
    "mask_token_id": MASK,
    "hidden_size": 48,
    "intermediate_size": 96,
    "initializer_range": 0.1,
    "block_size": BLOCK,
}


class Trained:
    """Copies of the one trained model, and prompts that it can and cannot continue."""

    def __init__(self, make_model: Any, num_steps: int = 200):
        self._make_model, self._num_steps = make_model, num_steps

    def model(self, dtype: torch.dtype = torch.float64) -> Any:
        """Return a fresh copy in eval mode."""
        model = self._make_model(dtype, **CONFIG)
        model.load_state_dict(_train(self._make_model, self._num_steps))
        return model

    def prompt(self, seed: int, length: int = 11) -> Tensor:
        """Make one prompt [1, length]."""
        return self.prompts(1, length, seed)

    def prompts(self, num_sequences: int, length: int = 11, seed: int = 0) -> Tensor:
        """Make prompts [num_sequences, length]."""
        return make_periodic(num_sequences, length, torch.Generator().manual_seed(1000 + seed))
