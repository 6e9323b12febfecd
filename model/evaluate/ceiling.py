"""The speed of light: the fewest forwards in which block diffusion could write the text that greedy AR writes.

An oracle that knows this text replaces the sampler. The prefill yields the first token. Every block begins with a known
token, its seed; the others are masked. In each denoising forward over the block, given the true prefix, the oracle
commits every masked position whose best token is already AR's, and at least one: if none is right, the first masked
position gets AR's token. One causal forward commits a full block and yields the next seed, exactly as in block
diffusion; the last block needs none. So

    forwards = 1 prefill + denoising forwards of all blocks + (blocks - 1) commits,

which is how every mode here counts, so that tokens / forwards compares with their tokens per forward. A second figure
leaves out the commits, which a sampler could merge with the first denoising forward of the next block. It is unknown
which of the two the published 7.60 (blocks of 32) is.

The last block is as long as what is left of max_new_tokens; masked positions after a stop token are context, not work.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model.export.images import PromptImage, load_pixels
from model.hf.cache import PrefixCache
from model.hf.layers import DraftAdapter

# Known positions of a block [N] -> the best token at every position [N], with the unknown positions masked.
Predict = Callable[[list[bool]], Sequence[int]]
# Start of a block among the new tokens, AR's tokens in it, its length [>= their number] -> its predictions.
OpenBlock = Callable[[int, list[int], int], Predict]


@dataclass(frozen=True)
class Ceiling:
    """The oracle's forwards over one or more responses that have `new_tokens` tokens together."""

    new_tokens: int
    num_prefills: int
    num_denoising: int
    num_commits: int

    @property
    def num_forwards(self) -> int:
        """All forwards, counted as block diffusion counts them."""
        return self.num_prefills + self.num_denoising + self.num_commits

    @property
    def tokens_per_forward(self) -> float:
        """The ceiling."""
        return self.new_tokens / self.num_forwards

    @property
    def tokens_per_forward_without_commits(self) -> float:
        """The ceiling of a sampler whose commits cost no forward of their own."""
        return self.new_tokens / (self.num_prefills + self.num_denoising)


def add_ceilings(ceilings: Sequence[Ceiling]) -> Ceiling:
    """Return the ceiling of all responses together."""
    return Ceiling(
        sum(c.new_tokens for c in ceilings),
        sum(c.num_prefills for c in ceilings),
        sum(c.num_denoising for c in ceilings),
        sum(c.num_commits for c in ceilings),
    )


def measure_ceiling(
    model: Any,
    prompt_ids: list[int],
    response: list[int],
    *,
    block_length: int,
    max_new_tokens: int,
    images: Iterable[PromptImage] = (),
) -> Ceiling:
    """Count the oracle's forwards for a response of greedy AR, stop token included. A draft adapter is not used."""
    with torch.no_grad(), DraftAdapter(model).suspended():
        predictor = _BlockPredictor(model, prompt_ids, response, images)
        return walk_blocks(response, block_length, max_new_tokens, predictor.open)


def walk_blocks(response: list[int], block_length: int, max_new_tokens: int, open_block: OpenBlock) -> Ceiling:
    """Let the oracle fill every block of the response. Blocks are opened from the last to the first."""
    starts = range(0, len(response), block_length)
    num_denoising = 0
    for start in reversed(starts):
        target = response[start : start + block_length]
        predict = open_block(start, target, min(block_length, max_new_tokens - start))
        num_denoising += count_denoising_forwards(target, predict)
    return Ceiling(len(response), 1, num_denoising, len(starts) - 1)


def count_denoising_forwards(target: list[int], predict: Predict) -> int:
    """Count forwards until a whole block is known. target: AR's tokens in it, the first of which is the seed."""
    known = [True] + [False] * (len(target) - 1)
    count = 0
    while not all(known):
        predicted = predict(known)
        count += 1
        right = [not was and best == token for was, best, token in zip(known, predicted, target, strict=False)]
        if not any(right):
            right[known.index(False)] = True
        known = [was or now for was, now in zip(known, right, strict=True)]
    return count


class _BlockPredictor:
    """Predicts blocks of one response, each after the true tokens before it.

    One causal forward caches all true tokens; the cache is then cropped block by block from the end.
    """

    def __init__(self, model: Any, prompt_ids: list[int], response: list[int], images: Iterable[PromptImage] = ()):
        self._model = model
        self._device = model.get_input_embeddings().weight.device
        self._prompt_length = len(prompt_ids)
        self._cache = PrefixCache(model.config.num_hidden_layers)
        tokens = torch.tensor([prompt_ids + response], device=self._device)
        model(tokens, past_key_values=self._cache, logits_to_keep=1, **load_pixels(images))

    def open(self, start: int, target: list[int], length: int) -> Predict:
        """Return the predictions of the block of `length` tokens that begins at `start` of the response."""
        self._cache.crop(self._prompt_length + start)

        def predict(known: list[bool]) -> list[int]:
            mask = self._model.config.mask_token_id
            shown = [token if is_known else mask for token, is_known in zip(target, known, strict=True)]
            block = torch.tensor([shown + [mask] * (length - len(target))], device=self._device)
            logits = self._model(block, past_key_values=self._cache, bidirectional=True, commit=False).logits[0]
            logits[:, mask] = -torch.inf  # no sampler ever chooses it
            return logits.argmax(-1).tolist()

        return predict
