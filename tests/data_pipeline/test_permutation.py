"""The order is a permutation of any number of items and differs from key to key."""

import pytest
import torch

from data_pipeline.permutation import derive_key, permute


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
