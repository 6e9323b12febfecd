"""A blend is a pure function of the sample index: exact shares, no sequence of a source skipped or repeated."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conf.schema import SourceConfig
from conf.system.errors import UserError
from data_pipeline import order as sample_order
from data_pipeline.dataset import TokenDataset, build_blend
from data_pipeline.packing.form import SequenceForm
from tests.helpers.stored import random_texts, write_dataset

FORM = SequenceForm(16, 4, 4)


@pytest.fixture
def small_rounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(sample_order, "ROUND_SLOTS", 128)
    sample_order._order_round.cache_clear()
    yield 128
    sample_order._order_round.cache_clear()


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, TokenDataset]:
    counts = {"web": 40, "code": 25, "maths": 10}
    paths = {name: write_dataset(tmp_path / name, [random_texts(count, 30, count)]) for name, count in counts.items()}
    return {name: TokenDataset(path, FORM, seed=1) for name, path in paths.items()}


def weights(**values: float) -> dict[str, SourceConfig]:
    return {name: SourceConfig(path=name, weight=value) for name, value in values.items()}


def test_every_round_has_exact_shares_and_no_gaps(small_rounds: int, sources: dict[str, TokenDataset]) -> None:
    blend = build_blend(sources, weights(web=5, code=2, maths=1), seed=3)
    numbers: dict[str, list[int]] = defaultdict(list)
    for sample in range(3 * small_rounds):
        name, number = blend.locate(sample)
        numbers[name].append(number)
    assert {name: len(found) for name, found in numbers.items()} == {"web": 240, "code": 96, "maths": 48}
    assert all(found == list(range(len(found))) for found in numbers.values())


def test_rounds_and_seeds_have_their_own_order(small_rounds: int, sources: dict[str, TokenDataset]) -> None:
    shares = weights(web=1, code=1, maths=1)
    orders = [
        [build_blend(sources, shares, seed).locate(sample)[0] for sample in range(start, start + small_rounds)]
        for seed in (1, 2)
        for start in (0, small_rounds)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_a_batch_holds_the_sequences_of_its_indices(sources: dict[str, TokenDataset]) -> None:
    blend = build_blend(sources, weights(web=2, code=1, maths=1), seed=3)
    indices = [0, 7, 100000, 7]
    batch = blend.build_batch(indices)
    assert batch.sample_indices.tolist() == indices
    for row, index in enumerate(indices):
        name, number = blend.locate(index)
        assert np.array_equal(batch.tokens[row], sources[name].build_sequence(number).tokens[0])


def test_a_lone_source_is_read_in_its_own_order(sources: dict[str, TokenDataset]) -> None:
    blend = build_blend({"web": sources["web"]}, {"web": SourceConfig(path="web")}, seed=3)
    assert [blend.locate(sample) for sample in (0, 5, 70000)] == [("web", 0), ("web", 5), ("web", 70000)]


def test_slots_are_the_weights_rounded_by_largest_remainder(sources: dict[str, TokenDataset]) -> None:
    equal = build_blend(sources, weights(web=1, code=1, maths=1), seed=3)
    assert sorted(source.slots for source in equal.order.sources) == [21845, 21845, 21846]
    budgets = {name: SourceConfig(path=name, tokens=value) for name, value in {"web": 3e11, "code": 1e11}.items()}
    two = {name: sources[name] for name in budgets}
    assert build_blend(two, budgets, seed=3).shares() == {"web": 0.75, "code": 0.25}
    with pytest.raises(UserError, match="the source maths"):
        build_blend(sources, weights(web=1, code=1, maths=1e-6), seed=3)


def test_epochs_say_how_often_a_source_is_read(sources: dict[str, TokenDataset]) -> None:
    blend = build_blend(sources, weights(web=2, code=1, maths=1), seed=3)
    epochs = blend.epochs(1000)
    assert epochs["web"] == pytest.approx(500 / sources["web"].num_sequences)
    assert epochs["maths"] == pytest.approx(250 / sources["maths"].num_sequences)


def test_the_fingerprint_changes_with_what_a_sequence_is_and_not_with_shares(sources: dict[str, TokenDataset]) -> None:
    shares = weights(web=2, code=1, maths=1)
    now = build_blend(sources, shares, seed=3).fingerprint()
    assert now == build_blend(sources, weights(web=1, code=2, maths=1), seed=3).fingerprint()
    assert now != build_blend(sources, shares, seed=4).fingerprint()
    other = {name: TokenDataset(source.stored.path, SequenceForm(8, 4, 4), seed=1) for name, source in sources.items()}
    assert now != build_blend(other, shares, seed=3).fingerprint()


def test_neither_names_nor_their_order_matter(small_rounds: int, sources: dict[str, TokenDataset]) -> None:
    shares = weights(web=2, code=1, maths=1)
    one = build_blend(sources, shares, seed=3)
    other = {f"new_{name}": sources[name] for name in ("maths", "web", "code")}
    two = build_blend(other, {f"new_{name}": config for name, config in shares.items()}, seed=3)
    assert two.order.follow(one.order, 50).first_sample == 0, "a change of names is none of the blend"
    for sample in range(0, 300, 7):
        (name, number), (new_name, new_number) = one.locate(sample), two.locate(sample)
        assert (f"new_{name}", number) == (new_name, new_number)


def test_samples_without_repeats_end_with_the_first_source(sources: dict[str, TokenDataset]) -> None:
    blend = build_blend(sources, weights(web=2, code=1, maths=1), seed=3)
    assert blend.num_samples_without_repeats == min(
        int(sources[name].num_sequences / share) for name, share in blend.shares().items()
    )
