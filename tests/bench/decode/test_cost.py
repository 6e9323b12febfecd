"""Cost of forwards by positions, what a way to decode gains from it, and where each wins."""

import pytest

from tests.bench.decode.cost import Cost, compute_speedup, find_winners, fit
from tests.bench.decode.settings import list_settings
from tests.bench.decode.trained import Run, add_up

AR = {"forwards_per_token": 1.0, "positions_per_token": 1.0}
SPECULATION = {"forwards_per_token": 0.5, "positions_per_token": 20.0}


def test_a_straight_line_is_found_again():
    cost = fit({positions: 0.003 + 0.0002 * positions for positions in (1, 4, 32, 272)})

    assert cost.fixed == pytest.approx(0.003)
    assert cost.per_position == pytest.approx(0.0002)
    assert cost.ratio == pytest.approx(15)


def test_relative_errors_count_alike_for_small_and_large_forwards():
    measured = {1: 0.010, 2: 0.011, 1000: 1.5, 2000: 4.0}

    cost = fit(measured)

    assert cost.fixed + cost.per_position == pytest.approx(
        0.010, rel=0.2
    )  # absolute errors would even make it negative


def test_half_the_forwards_are_twice_as_fast_where_positions_cost_nothing_and_lose_where_they_cost_all():
    assert compute_speedup(AR, 7.0) == 1
    assert compute_speedup(SPECULATION, 1e9) == pytest.approx(2)
    assert compute_speedup(SPECULATION, 0.0) == pytest.approx(1 / 20)


def test_winners_change_where_their_costs_cross():
    # Equal costs: ratio + 1 == 0.5 * ratio + 20.
    winners = find_winners({"ar": AR, "speculation": SPECULATION}, [1, 37, 39, 1000])

    assert winners == [(1, "ar"), (39, "speculation")]


def test_figures_are_ratios_of_sums_and_leave_the_prefill_out_of_costs():
    setting = list_settings(has_adapter=False)[0]
    runs = [Run(setting, 11, 6, 50, 1.0, [2, 2], "equal"), Run(setting, 21, 6, 10, 1.0, [5], "tie")]

    figures = add_up(runs)

    assert figures["tokens_per_forward"] == 32 / 12
    assert figures["forwards_per_token"] == 10 / 30
    assert figures["positions_per_token"] == 60 / 30
    assert figures["acceptance_length"] == 3
    assert figures["tokens_per_second"] == 16
    assert figures["agreement"] == {"equal": 1, "tie": 1}


def test_settings_have_names_of_their_own():
    names = [setting.name for setting in list_settings(has_adapter=True)]

    assert len(set(names)) == len(names)
    assert "quadratic+adapter, block 4, 2 groups" in names
    assert Cost(1.0, 2.0, {}).ratio == 0.5
