"""Which blocks of a batch are drafted, and who sees whom among them.

Shapes: B sequences, S tokens of the longest, K blocks per sequence, N tokens of a block, its seed included.
A block is what decoding drafts: [seed, MASK x (N - 1)], the seed being a true token at a random anchor. Its rows see
the clean tokens before the seed and each other, both ways.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data_pipeline.order import derive_key
from lora.examples import Example


@dataclass(frozen=True)
class DraftBatch:
    """tokens: [B, S] int64, padded behind each sequence. num_tokens: without the padding.

    anchors: [B, K] int64, index of each block's seed.
    scored: [B, K, N - 1] bool, drafted positions that count: those up to the end of the answer the seed stands in; all
        false for a block that only fills up the batch.
    """

    tokens: Tensor
    num_tokens: int
    anchors: Tensor
    scored: Tensor

    @property
    def num_blocks(self) -> int:
        """Blocks with something to draft."""
        return int(self.scored[..., 0].sum())

    def trim(self, blocks: int) -> "DraftBatch":
        """The same with the first `blocks` blocks of each sequence."""
        return replace(self, anchors=self.anchors[:, :blocks], scored=self.scored[:, :blocks])

    def to(self, device: torch.device) -> "DraftBatch":
        """The same on another device."""
        return replace(
            self, tokens=self.tokens.to(device), anchors=self.anchors.to(device), scored=self.scored.to(device)
        )


def build_draft_batch(
    examples: Sequence[Example], sample_indices: Sequence[int], *, blocks: int, block_size: int, seed: int
) -> DraftBatch:
    """One microbatch; the anchors are a pure function of `seed` and each example's sample index.

    blocks: K, drafted blocks per sequence; a sequence with fewer possible anchors uses each of them once.
    """
    length = max(len(example.tokens) for example in examples)
    tokens = np.zeros((len(examples), length), dtype=np.int64)
    anchors = np.zeros((len(examples), blocks), dtype=np.int64)
    scored = np.zeros((len(examples), blocks, block_size - 1), dtype=bool)
    for row, (example, index) in enumerate(zip(examples, sample_indices, strict=True)):
        tokens[row, : len(example.tokens)] = example.tokens
        chosen = choose_anchors(example.drafted, blocks, derive_key(seed, index))
        anchors[row, : len(chosen)] = chosen
        scored[row, : len(chosen)] = _find_scored(example.drafted, chosen, block_size)
    num_tokens = sum(len(example.tokens) for example in examples)
    return DraftBatch(torch.from_numpy(tokens), num_tokens, torch.from_numpy(anchors), torch.from_numpy(scored))


def choose_anchors(drafted: np.ndarray, count: int, key: int) -> np.ndarray:
    """At most `count` different seeds, in ascending order: tokens of an answer that another one follows.

    drafted: [n] bool, tokens that may be drafted. key: names the random choice.
    """
    candidates = np.flatnonzero(drafted[:-1] & drafted[1:])
    if len(candidates) <= count:
        return candidates
    return np.sort(np.random.Generator(np.random.Philox(key=key)).choice(candidates, count, replace=False))


def _find_scored(drafted: np.ndarray, anchors: np.ndarray, block_size: int) -> np.ndarray:
    """[K, N - 1] bool: positions behind each anchor as long as the same answer goes on."""
    padded = np.concatenate([drafted, np.zeros(block_size, dtype=bool)])
    behind = padded[anchors[:, None] + np.arange(1, block_size)]
    return np.logical_and.accumulate(behind, axis=1)


def build_block_tokens(batch: DraftBatch, mask_token_id: int) -> Tensor:
    """[B, K * N]: every block's seed followed by masks."""
    blocks, positions = batch.anchors.shape[1], batch.scored.shape[2]
    tokens = batch.tokens.new_full((len(batch.tokens), blocks, positions + 1), mask_token_id)
    tokens[:, :, 0] = batch.tokens.gather(1, batch.anchors)
    return tokens.flatten(1)


def build_block_positions(batch: DraftBatch) -> Tensor:
    """[B, K * N]: positions in the sequence; those of a block begin at its anchor."""
    offsets = torch.arange(batch.scored.shape[2] + 1, device=batch.anchors.device)
    return (batch.anchors[:, :, None] + offsets).flatten(1)


def build_block_mask(batch: DraftBatch) -> Tensor:
    """[B, 1, K * N, S + K * N] bool, true where a row of a block sees a clean token or a row of a block."""
    block_size = batch.scored.shape[2] + 1
    anchors = batch.anchors.repeat_interleave(block_size, dim=1)
    clean = torch.arange(batch.tokens.shape[1], device=anchors.device) < anchors[..., None]
    block = torch.arange(anchors.shape[1], device=anchors.device) // block_size
    own = (block[:, None] == block[None]).expand(len(anchors), -1, -1)
    return torch.cat([clean, own], dim=2)[:, None]


def gather_targets(batch: DraftBatch) -> Tensor:
    """[B, K, N - 1]: the tokens that stand where the masks do; anything beyond the end of a sequence."""
    positions = build_block_positions(batch).view(*batch.anchors.shape, -1)[:, :, 1:]
    inside = positions.clamp(max=batch.tokens.shape[1] - 1)
    return batch.tokens.gather(1, inside.flatten(1)).view(inside.shape)
