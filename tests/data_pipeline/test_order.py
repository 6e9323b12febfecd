"""The order is a permutation of any number of items and differs from key to key.

Whatever is changed on resume, every source is read 0, 1, 2, ...; and without a change nothing changes.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch

from conf.system.errors import UserError
from data_pipeline import order as sample_order
from data_pipeline.order import BlendOrder, SourceOrder, derive_key, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 64, 65, 1000, 4097])
def test_every_item_comes_exactly_once(size: int) -> None:
    assert sorted(permute(i, size, key=17) for i in range(size)) == list(range(size))


def test_other_keys_give_other_orders() -> None:
    orders = {
        tuple(permute(i, 100, derive_key(seed, epoch)) for i in range(100)) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_order_is_as_uncorrelated_as_torchs_own() -> None:
    size = 20_000
    ours = torch.tensor([permute(i, size, key=5) for i in range(size)], dtype=torch.float64)
    theirs = torch.randperm(size, generator=torch.Generator().manual_seed(0)).double()
    identity = torch.arange(size, dtype=torch.float64)
    for order in (ours, theirs):
        shifted = torch.corrcoef(torch.stack((order[1:], order[:-1])))[0, 1]
        assert abs(torch.corrcoef(torch.stack((order, identity)))[0, 1]) < 5 / size**0.5
        assert abs(shifted) < 5 / size**0.5


def test_order_of_two_items_depends_on_the_key() -> None:
    firsts = [permute(0, 2, derive_key(seed, 0)) for seed in range(200)]
    assert 60 < sum(firsts) < 140


def test_a_trillion_items_cost_nothing() -> None:
    size = 10**12 + 39
    items = {permute(i, size, key=3) for i in range(100)}
    assert len(items) == 100
    assert all(0 <= item < size for item in items)


ROUND = 128
SIZES = {"a1": 40, "b2": 75, "c3": 9, "d4": 300, "e5": 31}  # sequences of an epoch, by content


@pytest.fixture(autouse=True)
def small_rounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sample_order, "ROUND_SLOTS", ROUND)
    sample_order._order_round.cache_clear()
    yield
    sample_order._order_round.cache_clear()


def fresh(slots: dict[str, int], seed: int = 3, names: dict[str, str] | None = None, scale: int = 1) -> BlendOrder:
    """Return the order a configuration asks for, as build_blend makes it.

    scale: of epochs, as for shorter sequences.
    """
    assert sum(slots.values()) == ROUND
    sources = (
        SourceOrder(sha256, (names or {}).get(sha256, sha256), count, SIZES[sha256] * scale)
        for sha256, count in sorted(slots.items())
    )
    return BlendOrder(seed, tuple(sources))


def saved(order: BlendOrder) -> BlendOrder:
    """Return the order as a checkpoint's manifest gives it back."""
    return BlendOrder.from_dict(json.loads(json.dumps(order.to_dict(), sort_keys=True)), "step_00000001")


def read(order: BlendOrder, samples: range) -> list[tuple[str, int]]:
    """Return content and number of the sequences at `samples`."""
    located = (order.locate(sample) for sample in samples)
    return [(order.sources[source].sha256, number) for source, number in located]


def draw_slots(draw: random.Random) -> dict[str, int]:
    """Draw some of the sources, with shares that sum to a round."""
    chosen = draw.sample(sorted(SIZES), draw.randint(1, len(SIZES)))
    edges = [0, *sorted(draw.sample(range(1, ROUND), len(chosen) - 1)), ROUND]
    return {sha256: end - start for sha256, start, end in zip(chosen, edges[:-1], edges[1:], strict=True)}


@pytest.mark.parametrize("seed", range(40))
def test_over_any_history_of_blends_each_source_is_read_without_gap_or_repeat(seed: int) -> None:
    draw = random.Random(seed)
    order, samples_seen = fresh(draw_slots(draw)), 0
    numbers: dict[str, list[int]] = defaultdict(list)
    for _ in range(8):
        end = samples_seen + draw.choice((0, 1, draw.randint(2, 50), draw.randint(100, 700), ROUND))
        for sha256, number in read(order, range(samples_seen, end)):
            numbers[sha256].append(number)
        counts = {source.sha256: count for source, count in zip(order.sources, order.count_read(end), strict=True)}
        assert counts == {sha256: len(numbers[sha256]) for sha256 in counts}
        order, samples_seen = fresh(draw_slots(draw)).follow(saved(order), end), end
    assert all(found == list(range(len(found))) for found in numbers.values())


@pytest.mark.parametrize("seed", range(10))
def test_without_a_change_the_order_goes_on_bit_for_bit(seed: int) -> None:
    draw = random.Random(seed)
    slots = draw_slots(draw)
    order = fresh(slots).follow(saved(fresh(draw_slots(draw))), 77)
    for samples_seen in (order.first_sample, 500):
        resumed = fresh(slots).follow(saved(order), samples_seen)
        assert resumed == order
        assert read(resumed, range(77, 900)) == read(order, range(77, 900))


def test_a_change_leaves_what_came_before_and_takes_effect_at_once() -> None:
    before = fresh({"a1": 64, "b2": 64})
    after = fresh({"a1": 96, "b2": 32}).follow(before, 2 * ROUND)
    assert after.first_sample == 2 * ROUND
    with pytest.raises(AssertionError):
        after.locate(2 * ROUND - 1)
    following = [sha256 for sha256, _ in read(after, range(2 * ROUND, 3 * ROUND))]
    assert following.count("a1") == 96 and following.count("b2") == 32
    assert before.count_read(2 * ROUND) == (128, 128)
    assert after.count_read(3 * ROUND) == (224, 160)


def test_a_source_that_comes_back_goes_on_where_it_stopped() -> None:
    both, alone = {"a1": 64, "b2": 64}, {"a1": ROUND}
    left_out = fresh(alone).follow(fresh(both), ROUND)
    assert read(left_out, range(ROUND, ROUND + 3)) == [("a1", 64), ("a1", 65), ("a1", 66)]
    back = fresh(both).follow(saved(left_out), 3 * ROUND)
    assert dict(reversed(read(back, range(3 * ROUND, 4 * ROUND)))) == {"a1": 64 + 2 * ROUND, "b2": 64}


def test_names_do_not_matter() -> None:
    slots, names = {"a1": 100, "b2": 28}, {"a1": "web", "b2": "code"}
    renamed = fresh(slots, names=names).follow(fresh(slots), 50)
    assert renamed.first_sample == 0 and [source.name for source in renamed.sources] == ["web", "code"]
    changed, other = (
        fresh({"a1": 28, "b2": 100}, names=names).follow(before, 50) for before in (fresh(slots), renamed)
    )
    assert changed == other


def test_each_new_blend_has_a_round_order_of_its_own() -> None:
    slots = {"a1": 64, "b2": 64}
    first = fresh(slots)
    second = fresh(slots).follow(fresh({"a1": 63, "b2": 65}), 10)
    starts = [[sha256 for sha256, _ in read(order, range(at, at + ROUND))] for order, at in ((first, 0), (second, 10))]
    assert starts[0] != starts[1]


def test_copies_of_a_source_are_read_each_for_itself() -> None:
    def copies(first: int) -> BlendOrder:
        return BlendOrder(3, tuple(SourceOrder("a1", name, n, 40) for name, n in (("x", first), ("y", ROUND - first))))

    order = copies(100).follow(saved(copies(28)), ROUND)
    assert [source.read for source in order.sources] == [28, 100]


@pytest.mark.parametrize("scale", [1, 2])
def test_in_another_form_the_same_share_of_the_epoch_counts_as_read(scale: int) -> None:
    """Twice as many sequences per epoch: twice the number; another seed alone: the same number."""
    former = fresh({"a1": 64, "d4": 64})
    order = fresh({"a1": 64, "d4": 64}, seed=4, scale=scale).follow(former, 100)
    assert order.first_sample == 100
    assert [source.read for source in order.sources] == [count * scale for count in former.count_read(100)]


def test_a_fraction_of_a_sequence_counts_as_read() -> None:
    longer = SourceOrder("a1", "a1", ROUND, 10)  # sequences four times as long
    assert [longer.continue_at(read, 40) for read in (0, 1, 4, 5, 40, 41)] == [0, 1, 1, 2, 10, 11]


def test_the_first_order_of_a_run_is_what_it_always_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of ORDER_VERSION 1 depend on these."""
    monkeypatch.setattr(sample_order, "ROUND_SLOTS", 1 << 16)
    slots = (21846, 21845, 21845)
    order = BlendOrder(1234, tuple(SourceOrder(str(n), str(n), count, 100) for n, count in enumerate(slots)))
    located = [order.locate(sample) for sample in (0, 1, 2, 3, 4, 70000)]
    assert located == [(0, 0), (0, 1), (2, 0), (1, 0), (1, 1), (0, 23352)]


@pytest.mark.parametrize("values", [{}, {"seed": 1, "sources": [{"sha256": "a"}], "first_sample": 0}])
def test_a_manifest_without_an_order_is_named(values: dict) -> None:
    with pytest.raises(UserError, match="step_00000001 does not say where its data continue"):
        BlendOrder.from_dict(values, "step_00000001")
