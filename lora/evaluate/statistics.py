"""The gain with its interval. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.commands.modes import LINEAR_ADAPTER
from model.evaluate.judging import JudgedBatch
from model.evaluate.statistics import (
    GroupNumbers,
    ModeNumbers,
    bootstrap,
    count_tokens_and_forwards,
    divide_sums,
    summarize,
)
from model.hf.options import AR, LINEAR


@dataclass(frozen=True)
class GroupGain:
    """numbers: of AR, linear and linear+adapter. gain_percent: of tokens per forward, by the adapter.

    interval: 95% bootstrap interval of the gain over prompts, in percent; None with a single prompt.
    """

    numbers: GroupNumbers
    gain_percent: float
    interval: tuple[float, float] | None

    @property
    def modes(self) -> dict[str, ModeNumbers]:
        """By name."""
        return self.numbers.modes

    @property
    def distinct_4grams(self) -> float:
        """Mean share of different 4-grams in AR's outputs; a low one is a loop, which flatters drafts."""
        return self.modes[AR].distinct_4grams


def summarize_gain(batches: Sequence[JudgedBatch], resamples: int, seed: int) -> GroupGain:
    """Gain on one or more prompts, each decoded by itself."""
    before, after = (count_tokens_and_forwards(batches, name) for name in (LINEAR, LINEAR_ADAPTER))
    return GroupGain(
        summarize(batches, resamples=resamples, seed=seed),
        float(compute_gain_percent(before.sum(0), after.sum(0))),
        bootstrap_gain(before, after, resamples, seed),
    )


def compute_gain_percent(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Relative gain of tokens per forward in percent; both are [..., (new tokens, forwards)]."""
    return 100 * (divide_sums(after) / divide_sums(before) - 1)


def bootstrap_gain(before: np.ndarray, after: np.ndarray, resamples: int, seed: int) -> tuple[float, float] | None:
    """Percentile interval of compute_gain_percent over prompts drawn with replacement, each with both its counts.

    before, after: [N, (new tokens, forwards)]. None for N = 1, of which nothing can be learnt.
    """
    both = np.concatenate((before, after), axis=1)
    return bootstrap(both, lambda sums: compute_gain_percent(sums[:, :2], sums[:, 2:]), resamples, seed)
