"""Batches of sequences with the places at which blocks are drafted.

Shapes: B sequences, S tokens of the longest, K blocks per sequence, N tokens of a block, its seed included.
A block is what decoding drafts: [seed, MASK x (N - 1)], the seed being a true token at a random anchor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data_pipeline.order import derive_key
from lora.examples.example_set import Example, ExampleOrder, ExampleSet
from model.export.images import PromptImage

ORDER, ANCHORS, HELDOUT, DRAWS = range(4)  # what keys are derived for


@dataclass(frozen=True)
class DraftBatch:
    """Sequences and the blocks that are drafted in them.

    tokens: [B, S] int64, padded after each sequence. num_tokens: without the padding.
    anchors: [B, K] int64, index of each block's seed.
    scored: [B, K, N - 1] bool, drafted positions that count: those up to the end of the response that holds the seed;
        all false for a block that only fills up the batch.
    draws: [B, K, N] fp32 in [0, 1), what is random about drawn drafts: in the seed's place the number that decides
        whether the block's draft is sampled, in the others those that its tokens are drawn with.
    images: of all sequences, in the order of their tokens; opened when the batch is encoded.
    """

    tokens: Tensor
    num_tokens: int
    anchors: Tensor
    scored: Tensor
    draws: Tensor
    images: tuple[PromptImage, ...] = ()

    @property
    def num_blocks(self) -> int:
        """Count the blocks with something to draft."""
        return int(self.scored[..., 0].sum())

    def trim(self, blocks: int) -> "DraftBatch":
        """Return the batch with the first `blocks` blocks of each sequence."""
        anchors, scored, draws = (tensor[:, :blocks] for tensor in (self.anchors, self.scored, self.draws))
        return replace(self, anchors=anchors, scored=scored, draws=draws)

    def to(self, device: torch.device) -> "DraftBatch":
        """Return the batch on another device."""
        tensors = (self.tokens, self.anchors, self.scored, self.draws)
        tokens, anchors, scored, draws = (tensor.to(device) for tensor in tensors)
        return replace(self, tokens=tokens, anchors=anchors, scored=scored, draws=draws)


class DraftBatches:
    """The microbatches of one rank, a pure function of the seed and the step.

    block_size: tokens of a drafted block, its seed included. blocks: drafted blocks per sequence.
    """

    def __init__(
        self, examples: ExampleSet, *, seed: int, blocks: int, block_size: int, micro_batch_size: int, is_heldout: bool
    ) -> None:
        """is_heldout: order and anchors are fixed, whatever the seed, and every sequence counts once."""
        self._examples, self._blocks, self._block_size = examples, blocks, block_size
        self._micro_batch_size, self._is_heldout = micro_batch_size, is_heldout
        seed = HELDOUT if is_heldout else seed
        self._order = ExampleOrder(len(examples), derive_key(seed, ORDER))
        self._anchor_key = derive_key(seed, ANCHORS)

    @property
    def num_examples(self) -> int:
        """Count the sequences of an epoch."""
        return len(self._examples)

    def draw(self, first: int, count: int, rank: int, num_ranks: int) -> list[DraftBatch]:
        """Return the microbatches of `rank` among the `count` sequences from sample index `first` on.

        count: a multiple of num_ranks * micro_batch_size.
        """
        shares = self._order.share_out(first, count, self._micro_batch_size, rank, num_ranks)
        return [self._build(sample_indices) for sample_indices in shares]

    def _build(self, sample_indices: Sequence[int]) -> DraftBatch:
        batch = build_draft_batch(
            [self._examples[self._order.find(index)] for index in sample_indices],
            sample_indices,
            blocks=self._blocks,
            block_size=self._block_size,
            seed=self._anchor_key,
        )
        if self._is_heldout:  # after the last sequence nothing counts
            is_surplus = [index >= self.num_examples for index in sample_indices]
            batch.scored[torch.tensor(is_surplus)] = False
        return batch


def build_draft_batch(
    examples: Sequence[Example], sample_indices: Sequence[int], *, blocks: int, block_size: int, seed: int
) -> DraftBatch:
    """Build one microbatch; its anchors and draws are a pure function of `seed` and each example's sample index.

    blocks: K, drafted blocks per sequence; a sequence with fewer possible anchors uses each of them once.
    """
    length = max(len(example.tokens) for example in examples)
    tokens = np.zeros((len(examples), length), dtype=np.int64)
    anchors = np.zeros((len(examples), blocks), dtype=np.int64)
    scored = np.zeros((len(examples), blocks, block_size - 1), dtype=bool)
    draws = np.zeros((len(examples), blocks, block_size), dtype=np.float32)
    for place, (example, index) in enumerate(zip(examples, sample_indices, strict=True)):
        tokens[place, : len(example.tokens)] = example.tokens
        chosen = choose_anchors(example.drafted, blocks, derive_key(seed, index))
        anchors[place, : len(chosen)] = chosen
        scored[place, : len(chosen)] = _find_scored(example.drafted, chosen, block_size)
        draws[place] = _random(derive_key(seed, index, DRAWS)).random((blocks, block_size), dtype=np.float32)
    num_tokens = sum(len(example.tokens) for example in examples)
    return DraftBatch(
        tokens=torch.from_numpy(tokens),
        num_tokens=num_tokens,
        anchors=torch.from_numpy(anchors),
        scored=torch.from_numpy(scored),
        draws=torch.from_numpy(draws),
        images=tuple(image for example in examples for image in example.images),
    )


def choose_anchors(drafted: np.ndarray, count: int, key: int) -> np.ndarray:
    """Choose at most `count` different seeds, in ascending order: tokens of a response that another one follows.

    drafted: [n] bool, tokens that may be drafted. key: names the random choice.
    """
    candidates = np.flatnonzero(drafted[:-1] & drafted[1:])
    if len(candidates) <= count:
        return candidates
    return np.sort(_random(key).choice(candidates, count, replace=False))


def _find_scored(drafted: np.ndarray, anchors: np.ndarray, block_size: int) -> np.ndarray:
    """Return [K, N - 1] bool: positions after each anchor as long as the same response goes on."""
    padded = np.concatenate([drafted, np.zeros(block_size, dtype=bool)])
    following = padded[anchors[:, None] + np.arange(1, block_size)]
    return np.logical_and.accumulate(following, axis=1)


def _random(key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))
