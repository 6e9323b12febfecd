"""How well a model that ignores context predicts: the yardstick for a first training run."""

import numpy as np


def unigram_entropy(train_counts: np.ndarray, heldout_counts: np.ndarray) -> float:
    """Unigram entropy of held-out text in nats per token.

    Definition: the cross entropy -sum_v h(v) log q(v), where h is the distribution of tokens in the held-out text and
    q(v) = (c(v) + 1) / sum_u (c(u) + 1) the add-one smoothed distribution of tokens in the training text.

    train_counts, heldout_counts: [vocab_size] occurrences of every token id.
    """
    smoothed = train_counts + 1.0
    log_probabilities = np.log(smoothed / smoothed.sum())
    return float(-(heldout_counts * log_probabilities).sum() / heldout_counts.sum())
