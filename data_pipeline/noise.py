"""Masking noise of the block-diffusion objective, a pure function of what is being masked.

Each document of each sample draws its own level t ~ U(0, 1) and masks its tokens independently with probability
p = (1 - eps) * t + eps. The draw depends on (seed, stage, split, global sample index, document) alone: it is the same
on every rank and in every layout, and nothing has to be saved to resume it exactly.
Source: the released training code of the model family; absorbing-state diffusion as in arXiv 2406.07524.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import Batch


@dataclass(frozen=True)
class NoiseSource:
    """Names the noise of a run: seed, stage name, split (train or heldout), and the lowest masking probability."""

    seed: int
    stage: str
    split: str
    epsilon: float

    def draw(self, sample_index: int, document: int, num_tokens: int) -> tuple[float, np.ndarray]:
        """Return a document's noise level t in [0, 1) and one uniform draw in [0, 1) per token, fp32 [num_tokens]."""
        name = f"{self.seed}/{self.stage}/{self.split}/{sample_index}/{document}"
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
        generator = np.random.Generator(np.random.Philox(key=key))
        return generator.random(), generator.random(num_tokens, dtype=np.float32)

    def mask(self, sample_index: int, document: int, num_tokens: int) -> tuple[np.ndarray, float]:
        """Return which of a document's tokens are masked where they may be, bool [num_tokens], and with which p."""
        level, uniform = self.draw(sample_index, document, num_tokens)
        probability = (1 - self.epsilon) * level + self.epsilon
        return uniform < np.float32(probability), probability


@dataclass(frozen=True)
class NoisyBatch:
    """Holds a batch and its noise: noisy_tokens [B, S], masked [B, S] bool, p_mask [B, S] fp32 masking probability."""

    batch: Batch
    noisy_tokens: Tensor
    masked: Tensor
    p_mask: Tensor

    @property
    def is_live(self) -> Tensor:
        """Return [B, S] bool: whether the noisy block of a token holds a masked token that may be scored.

        The others are read by none: a noisy block is seen by itself alone, and nothing in them is scored.
        """
        block_ids = self.batch.block_ids
        scored = torch.zeros_like(block_ids).scatter_add_(1, block_ids, (self.masked & self.batch.loss_mask).long())
        return scored.gather(1, block_ids) > 0

    @property
    def doubled_tokens(self) -> Tensor:
        """Return the tokens of a joint forward, [noisy | clean] [B, 2S]."""
        return torch.cat([self.noisy_tokens, self.batch.tokens], dim=1)


def add_noise(batch: Batch, source: NoiseSource, mask_token_id: int) -> NoisyBatch:
    """Mask tokens that may be scored, and block padding; everything else stays clean. CPU only."""
    p_mask = np.ones(batch.tokens.shape, dtype=np.float32)
    masked = np.zeros(batch.tokens.shape, dtype=bool)
    for sequence, sample_index in enumerate(batch.sample_indices.tolist()):
        for document, inside in _find_documents(batch.document_ids[sequence].numpy()):
            masked[sequence, inside], p_mask[sequence, inside] = source.mask(sample_index, document, len(inside))
    is_masked = torch.from_numpy(masked) & (batch.loss_mask | batch.block_padding)
    noisy_tokens = torch.where(is_masked, mask_token_id, batch.tokens)
    return NoisyBatch(batch, noisy_tokens, is_masked, torch.from_numpy(p_mask))


def _find_documents(document_ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number of each document of a sequence [S], and the indices of its tokens."""
    inside = np.flatnonzero(document_ids >= 0)
    documents = document_ids[inside]
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    yield from zip(documents[starts].tolist(), np.split(inside, starts)[1:], strict=True)
