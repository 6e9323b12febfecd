"""Greedy decoding as plain loops over a causal LM of transformers with a DynamicCache: the reference for speed.

Every mode is a plain loop for one prompt: masks are built in each forward, every position reaches the head, and the
cache is cropped afterwards. Outputs are those of our decode loops. Shapes: prompt [1, P], results [T] tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

Result = tuple[list[int], int]  # new tokens, forwards


@torch.no_grad()
def loop_ar(model: Any, prompt: Tensor, max_new_tokens: int) -> Result:
    """Decode one token per forward."""
    cache = DynamicCache(config=model.config)
    tokens, output = prompt, []
    for _ in range(max_new_tokens):
        tokens = model(tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        output.append(tokens)
    return torch.cat(output, dim=1)[0].tolist(), max_new_tokens


@torch.no_grad()
def loop_block_diffusion(
    model: Any, prompt: Tensor, max_new_tokens: int, block_length: int, mask: int, threshold: float
) -> Result:
    """Denoise block after block; commit what is at least `threshold` probable, and the best one."""
    cache = DynamicCache(config=model.config)
    seed = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
    output: list[int] = []
    num_forwards = 1
    while True:
        block = torch.full((1, min(block_length, max_new_tokens - len(output))), mask)
        block[:, :1] = seed
        masked = torch.arange(block.shape[1])[None] > 0
        while masked.any():
            confidence, best = _see_all(model, block, cache, mask).softmax(-1).max(-1)
            num_forwards += 1
            confidence = torch.where(masked, confidence, -1.0)
            chosen = confidence >= threshold
            chosen[0, confidence.argmax()] = True
            block = torch.where(chosen, best, block)
            masked &= ~chosen
        output += block[0].tolist()
        if len(output) == max_new_tokens:
            return output, num_forwards
        seed = model(block, past_key_values=cache).logits[:, -1:].argmax(-1)
        num_forwards += 1


@torch.no_grad()
def loop_linear(model: Any, prompt: Tensor, max_new_tokens: int, block_length: int, mask: int) -> Result:
    """Draft a block in one forward, verify it in the next."""
    cache = DynamicCache(config=model.config)
    seed = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
    output = seed[0].tolist()
    num_forwards = 1
    while len(output) < max_new_tokens:
        block = torch.full((1, min(block_length, max_new_tokens - len(output))), mask)
        block[:, :1] = seed
        if block.shape[1] > 1:
            block[:, 1:] = _see_all(model, block, cache, mask)[:, 1:].argmax(-1)
            num_forwards += 1
        num_cached = cache.get_seq_length()
        choices = model(block, past_key_values=cache).logits.argmax(-1)
        num_forwards += 1
        num_accepted = _count_accepted(block, choices)
        _crop(cache, num_cached + num_accepted + 1)
        output += choices[0, : num_accepted + 1].tolist()
        seed = choices[:, num_accepted : num_accepted + 1]
    return output, num_forwards


@torch.no_grad()
def loop_quadratic(model: Any, prompt: Tensor, max_new_tokens: int, block_length: int, mask: int) -> Result:
    """Verify a draft and, after each of its tokens, draft the next one, all in one forward; the prefill drafts too."""
    cache = DynamicCache(config=model.config)
    drafted = torch.full((1, block_length), mask)
    logits = _see_groups(model, prompt, drafted, [prompt.shape[1] - 1], cache)
    block = torch.cat((logits[:, prompt.shape[1] - 1 :][:, :1], logits[:, prompt.shape[1] + 1 :]), dim=1).argmax(-1)
    _crop(cache, prompt.shape[1])
    output = block[0, :1].tolist()
    num_forwards = 1
    while (left := max_new_tokens - len(output)) > 0:
        block = block[:, : min(block_length, left)]
        num_verified, num_cached = block.shape[1], cache.get_seq_length()
        ends = list(range(num_verified)) if num_verified > 1 or left > 1 else []  # a last token needs no next draft
        logits = _see_groups(model, block, drafted, ends, cache)
        num_forwards += 1
        choices = logits[:, :num_verified].argmax(-1)
        num_accepted = _count_accepted(block, choices)
        _crop(cache, num_cached + num_accepted + 1)
        output += choices[0, : num_accepted + 1].tolist()
        first = num_verified + num_accepted * block_length
        proposed = logits[:, first + 1 : first + block_length].argmax(-1)
        block = torch.cat((choices[:, num_accepted : num_accepted + 1], proposed), dim=1)
    return output, num_forwards


LOOPS: dict[str, Callable[..., Result]] = {
    "ar": loop_ar,
    "block_diffusion": loop_block_diffusion,
    "linear": loop_linear,
    "quadratic": loop_quadratic,
}


def _see_all(model: Any, block: Tensor, cache: DynamicCache, mask: int) -> Tensor:
    """Return logits [1, N, vocab] of a block whose tokens see each other both ways, the mask's at minus infinity."""
    num_cached, num_new = cache.get_seq_length(), block.shape[1]
    visible = torch.ones(1, 1, num_new, num_cached + num_new, dtype=torch.bool)
    logits = model(block, attention_mask=visible, past_key_values=cache).logits
    _crop(cache, num_cached)
    logits[..., mask] = -torch.inf
    return logits


def _crop(cache: DynamicCache, length: int) -> None:
    """Crop the cache to its first `length` tokens."""
    cache.crop(length - cache.get_seq_length())  # a negative number of tokens to remove


def _count_accepted(block: Tensor, choices: Tensor) -> int:
    """Count the drafted tokens block[1:] that equal the choices after their predecessors, up to the first other one."""
    return int((block[0, 1:] == choices[0, :-1]).long().cumprod(0).sum())


def _see_groups(model: Any, tokens: Tensor, masks: Tensor, ends: list[int], cache: DynamicCache) -> Tensor:
    """Return logits [1, N, vocab] of causal tokens [1, V], then for each of `ends` of masks [1, M] after that token.

    The masks see each other and the tokens up to their own. No position ever prefers the mask: its head is zero.
    """
    num_tokens, num_cached = tokens.shape[1], cache.get_seq_length()
    end = torch.tensor([*range(num_tokens), *(end for end in ends for _ in range(masks.shape[1]))])
    group = torch.tensor([-1] * num_tokens + [end for end in ends for _ in range(masks.shape[1])])
    after = torch.tensor([0] * num_tokens + [*range(1, masks.shape[1] + 1)] * len(ends))
    is_token = group == -1
    visible = is_token[None] & (end[None] <= end[:, None])
    visible |= ~is_token[None] & (group[None] == group[:, None])
    seen = torch.cat((visible.new_ones(len(visible), num_cached), visible), dim=1)
    return model(
        torch.cat((tokens, *[masks] * len(ends)), dim=1),
        attention_mask=seen[None, None],
        position_ids=(num_cached + end + after)[None],
        past_key_values=cache,
    ).logits
