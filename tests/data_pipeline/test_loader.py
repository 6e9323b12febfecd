"""The sequences of a step are the same in every layout, and any step can be built first."""

from pathlib import Path

import pytest

from data_pipeline.dataset import TokenDataset
from data_pipeline.loader import BatchLoader

GLOBAL = 16


def step_samples(dataset: TokenDataset, samples_seen: int, micro: int, dp_size: int) -> list[int]:
    """Global sample indices of the step after `samples_seen` samples, in the order microbatch, rank, row."""
    loaders = [BatchLoader(dataset, GLOBAL, micro, rank, dp_size) for rank in range(dp_size)]
    batches = [loader.microbatches(samples_seen) for loader in loaders]
    return [i for m in range(loaders[0].num_microbatches) for rank in batches for i in rank[m].sample_indices.tolist()]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_step_has_the_same_samples_in_every_layout(prefix: Path, micro: int, dp_size: int) -> None:
    dataset = TokenDataset(prefix, 32, 8, seed=3)
    for seen in (0, 7 * GLOBAL, 5):
        assert step_samples(dataset, seen, micro, dp_size) == list(range(seen, seen + GLOBAL))


def test_a_later_step_is_built_without_the_ones_before(prefix: Path) -> None:
    walked, jumped = TokenDataset(prefix, 32, 8, seed=3), TokenDataset(prefix, 32, 8, seed=3)
    walker = BatchLoader(walked, GLOBAL, 4, 1, 2)
    everything = [walker.microbatches(step * GLOBAL) for step in range(5)]
    resumed = BatchLoader(jumped, GLOBAL, 4, 1, 2).microbatches(4 * GLOBAL)
    assert len(resumed) == 2
    for before, after in zip(everything[4], resumed, strict=True):
        assert before.tokens.equal(after.tokens)
        assert before.sample_indices.equal(after.sample_indices)
