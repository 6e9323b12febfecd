"""The benchmark's two formulations agree, and what it counts is what it says."""

import json

import pytest

from pretrain.costs import count_attended_pairs
from tests.bench.joint.cases import BLOCK_SIZE, Case, build_batch
from tests.bench.joint.floor import build_matmuls, count_reference_work, count_useful_work
from tests.bench.joint.parts import build_parts
from tests.bench.joint.sides import AR, OURS, REFERENCE, build_side, trainer_session
from tests.bench.joint.speed import TOLERANCE, assert_same_results
from tests.bench.timing import measure_in_turns, ratio, spread

TINY = Case(64, 512)


def test_the_straightforward_formulation_and_ours_have_the_same_losses_and_gradients() -> None:
    with trainer_session():
        assert assert_same_results(build_side(TINY, REFERENCE), build_side(TINY, OURS)) < TOLERANCE
        joint, ar = build_parts(build_side(TINY, OURS)), build_parts(build_side(TINY, AR))
        times = measure_in_turns({**joint, "ar": ar["layers"]}, rounds=2)
    assert [len(values) for values in times.values()] == [2, 2, 2]


def test_useful_work_is_that_of_the_flop_count() -> None:
    work = count_useful_work(TINY)
    assert work.num_positions == 128
    assert work.attended_pairs == count_attended_pairs(64, BLOCK_SIZE, doubled=True)
    assert work.scored_positions == 63 + 32
    assert int(build_batch(TINY).masked.sum()) == 32
    assert count_reference_work(TINY).attended_pairs == 128 * 128
    for matmul in build_matmuls(TINY.model, work):
        matmul()


def test_ratios_are_of_medians() -> None:
    assert ratio([3, 1, 100], [1, 1, 1]) == 3
    assert spread([1, 2, 3]) == pytest.approx(0.25)
    assert json.dumps(spread([1.0])) == "0.0"
