"""The sequences of a step are the same in every layout, and any step can be built first."""

from dataclasses import replace
from pathlib import Path

import pytest

from conf.schema import SourceConfig
from data_pipeline.batch import Batch
from data_pipeline.dataset import Blend, TokenDataset, build_blend
from data_pipeline.loader import BatchLoader
from data_pipeline.packing.form import SequenceForm

GLOBAL = 16


def open_blend(path: Path) -> Blend:
    """Open two sources of the same data, so that both the blend and the order within a source matter."""
    configs = {name: SourceConfig(path=str(path), weight=weight) for name, weight in (("a", 3.0), ("b", 1.0))}
    sources = {name: TokenDataset(path, SequenceForm(32, 8, 8), seed) for seed, name in enumerate(configs)}
    return build_blend(sources, configs, seed=3)


def step_samples(blend: Blend, samples_seen: int, micro: int, dp_size: int) -> list[int]:
    """Return sample indices of the step after `samples_seen` samples, in the order microbatch, rank, sequence."""
    loaders = [BatchLoader(blend, GLOBAL, micro, rank, dp_size) for rank in range(dp_size)]
    batches = [loader.microbatches(samples_seen) for loader in loaders]
    return [i for m in range(loaders[0].num_microbatches) for rank in batches for i in rank[m].sample_indices.tolist()]


def same(some: list[Batch], others: list[Batch]) -> bool:
    return len(some) == len(others) and all(
        tensor.equal(expected)
        for one, other in zip(some, others, strict=True)
        for tensor, expected in zip(one.tensors(), other.tensors(), strict=True)
    )


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_step_has_the_same_samples_in_every_layout(dataset_dir: Path, micro: int, dp_size: int) -> None:
    blend = open_blend(dataset_dir)
    for seen in (0, 7 * GLOBAL, 5):
        assert step_samples(blend, seen, micro, dp_size) == list(range(seen, seen + GLOBAL))


@pytest.mark.parametrize("prefetch_steps", [0, 1, 3])
def test_a_later_step_is_built_without_the_ones_before(dataset_dir: Path, prefetch_steps: int) -> None:
    walker = BatchLoader(open_blend(dataset_dir), GLOBAL, 4, 1, 2, prefetch_steps)
    everything = [walker.microbatches(step * GLOBAL) for step in range(5)]
    for step in (4, 0, 2):
        resumed = BatchLoader(open_blend(dataset_dir), GLOBAL, 4, 1, 2)
        assert same(resumed.microbatches(step * GLOBAL), everything[step])
    assert same(walker.microbatches(2 * GLOBAL), everything[2]), "going back is no error either"


def test_prefetching_reads_ahead_and_keeps_no_more_than_asked(dataset_dir: Path) -> None:
    loader = BatchLoader(open_blend(dataset_dir), GLOBAL, 4, 0, 1, prefetch_steps=2)
    for step in range(6):
        loader.microbatches(step * GLOBAL)
        assert sorted(loader._ahead) == [(step + 1) * GLOBAL, (step + 2) * GLOBAL]


def test_nothing_is_read_ahead_of_the_end(dataset_dir: Path) -> None:
    loader = BatchLoader(open_blend(dataset_dir), GLOBAL, 4, 0, 1, prefetch_steps=2, num_samples=3 * GLOBAL)
    for step, ahead in enumerate(([1, 2], [2], [])):
        loader.microbatches(step * GLOBAL)
        assert sorted(loader._ahead) == [later * GLOBAL for later in ahead]


def test_a_run_that_leaves_out_data_reads_ahead_to_its_later_end(dataset_dir: Path) -> None:
    loader = BatchLoader(open_blend(dataset_dir), GLOBAL, 4, 0, 1, prefetch_steps=1, num_samples=3 * GLOBAL)
    loader.microbatches(0)
    loader.num_samples = 6 * GLOBAL
    assert loader.microbatches(4 * GLOBAL)[0].sample_indices[0] == 4 * GLOBAL
    assert sorted(loader._ahead) == [5 * GLOBAL], "what was read ahead of the gap is dropped"


def test_what_fails_ahead_fails_when_it_is_asked_for(dataset_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = BatchLoader(open_blend(dataset_dir), GLOBAL, 4, 0, 1, prefetch_steps=1)
    loader.microbatches(0)
    loader._ahead[GLOBAL].result()
    monkeypatch.setattr(Blend, "build_batch", lambda *arguments: 1 / 0)
    loader.microbatches(GLOBAL)
    with pytest.raises(ZeroDivisionError):
        loader.microbatches(2 * GLOBAL)


@pytest.mark.parametrize("prefetch_steps", [0, 1])
def test_every_microbatch_is_decoded_where_it_is_built(dataset_dir: Path, prefetch_steps: int) -> None:
    decoded: list[Batch] = []

    def decode(batch: Batch) -> Batch:
        decoded.append(replace(batch, loss_mask=~batch.loss_mask))
        return decoded[-1]

    plain = BatchLoader(open_blend(dataset_dir), GLOBAL, 4, 0, 1)
    loader = BatchLoader(open_blend(dataset_dir), GLOBAL, 4, 0, 1, prefetch_steps, decode=decode)
    for step in range(3):
        batches = loader.microbatches(step * GLOBAL)
        assert all(batch is one for batch, one in zip(batches, decoded[4 * step :], strict=False))
        assert [batch.tokens.tolist() for batch in batches] == [
            batch.tokens.tolist() for batch in plain.microbatches(step * GLOBAL)
        ]
