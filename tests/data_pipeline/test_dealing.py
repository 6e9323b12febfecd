"""Sequences are dealt evenly: every one once, as many to each rank, within the bound that the module promises."""

import random
from collections.abc import Sequence

import pytest

from data_pipeline.dealing import Deal, deal_evenly, deal_in_order


def deal(costs: Sequence[float], size: int, ranks: int) -> Deal:
    """Deal, where a microbatch costs what its longest sequence makes of all."""
    return deal_evenly(costs, size, ranks, lambda places: len(places) * max(costs[place] for place in places))


def test_the_picture_in_the_module() -> None:
    dealt = deal([9, 8, 7, 4, 3, 1], 1, 2)
    assert dealt.microbatches == [[[0], [3], [4]], [[1], [2], [5]]]
    assert (dealt.rank_imbalance, dealt.undealt_rank_imbalance) == (1, 19 / 16)
    assert dealt.microbatch_imbalance == dealt.undealt_microbatch_imbalance == 9 / (32 / 6)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_sequence_is_dealt_once_and_ranks_differ_by_less_than_a_round(size: int, ranks: int) -> None:
    for seed in range(50):
        draw = random.Random(seed)
        count = size * ranks * draw.choice((1, 2, 4, 7))
        costs = [draw.choice((draw.uniform(1, 2), draw.lognormvariate(0, 2))) for _ in range(count)]
        dealt = deal(costs, size, ranks)
        assert sorted(place for rank in dealt.microbatches for group in rank for place in group) == list(range(count))
        assert {len(rank) for rank in dealt.microbatches} == {count // size // ranks}
        assert all(len(group) == size for rank in dealt.microbatches for group in rank)
        heaviest = [[size * max(costs[place] for place in group) for group in rank] for rank in dealt.microbatches]
        totals = [sum(rank) for rank in heaviest]
        rounds = list(zip(*heaviest, strict=True))
        assert max(totals) - min(totals) <= max(max(one) - min(one) for one in rounds) + 1e-9
        assert dealt.rank_imbalance == pytest.approx(max(totals) / (sum(totals) / ranks))
        assert deal(costs, size, ranks) == dealt, "it is the same on every rank"


def test_equal_sequences_stay_in_order() -> None:
    assert deal([2.0] * 16, 2, 4).microbatches == deal_in_order(16, 2, 4).microbatches
    assert deal_in_order(8, 2, 2).microbatches == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_one_sequence_that_outweighs_the_others_is_a_rank_of_its_own_load() -> None:
    dealt = deal([100, *[1] * 7], 1, 4)
    assert dealt.rank_imbalance == pytest.approx(101 / (107 / 4)), "no deal of whole sequences does better"
