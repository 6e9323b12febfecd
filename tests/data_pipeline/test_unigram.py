"""The yardstick agrees with cross entropy as PyTorch computes it."""

import numpy as np
import torch
from torch.nn import functional

from data_pipeline.unigram import unigram_entropy


def test_unigram_entropy_is_the_cross_entropy_of_a_constant_predictor() -> None:
    generator = torch.Generator().manual_seed(0)
    train, heldout = (torch.randint(0, high, (500,), generator=generator) for high in (9, 10))
    train_counts, heldout_counts = (np.bincount(tokens, minlength=12) for tokens in (train, heldout))
    logits = torch.log(torch.from_numpy(train_counts + 1.0)).expand(len(heldout), -1)
    assert np.isclose(unigram_entropy(train_counts, heldout_counts), functional.cross_entropy(logits, heldout).item())


def test_uniform_tokens_have_the_logarithm_of_their_number() -> None:
    counts = np.full(8, 1000)
    assert np.isclose(unigram_entropy(counts, counts), np.log(8))
