"""What ranks exchange reaches every rank; slow ranks are named."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from pretrain.health import heartbeat
from pretrain.health.heartbeat import Heartbeat, Stragglers
from pretrain.objective.losses import StepNumbers, join_numbers
from pretrain.objective.scoring import StepCounts


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch):
    """Return a function that builds stragglers of given peers, without processes that would exchange their places."""

    def build(peers: list[list[int]], factor: float = 1.5) -> Stragglers:
        monkeypatch.setattr(Stragglers, "__post_init__", lambda self: None)
        return Stragglers(factor, peers)

    return build


def reports(stragglers: Stragglers, seconds: list[float], steps: int) -> list[tuple[int, int]]:
    """Return (step, rank) of every report."""
    ratios = stragglers.compare(seconds)
    return [(step, rank) for step in range(1, steps + 1) for rank, _ in stragglers.update(ratios, step)]


def test_a_rank_that_stays_slow_is_named_and_again_after_a_while(build) -> None:
    named = reports(build([[0, 1, 2, 3]]), [1.0, 1.1, 3.0, 0.9], steps=150)
    assert {rank for _, rank in named} == {2}
    assert [step for step, _ in named] == [3, 3 + heartbeat.REPEAT_STEPS]


def test_one_slow_step_is_no_straggler(build) -> None:
    stragglers = build([[0, 1]])
    assert not stragglers.update(stragglers.compare([1.0, 400.0]), 1)
    assert not reports(stragglers, [1.0, 1.0], 20)


def test_ranks_that_do_other_work_are_not_compared(build) -> None:
    assert not reports(build([[0, 1], [2, 3]]), [1.0, 1.0, 5.0, 5.0], steps=50)
    assert not reports(build([[0], [1]]), [1.0, 9.0], steps=50)


def test_of_two_peers_the_slower_one_is_named(build) -> None:
    assert {rank for _, rank in reports(build([[0, 1]]), [2.0, 1.0], steps=50)} == {0}


def test_a_rank_is_compared_with_the_peers_of_its_pipeline_stage(build) -> None:
    ratios = build([[0, 1], [2, 3]]).compare([1.0, 2.0, 5.0, 5.0])  # the head's pipeline stage takes longer than all
    assert max(ratios, key=ratios.__getitem__) == 1
    assert ratios == {0: 1.0, 1: 2.0, 2: 1.0, 3: 1.0}


def test_everything_is_exchanged_in_one_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    num_counts = len(fields(StepCounts))
    counts = StepCounts(*(torch.tensor(value) for value in range(num_counts)))  # pyright: ignore[reportArgumentType]
    numbers = join_numbers(torch.arange(5.0, dtype=torch.float64), counts, torch.tensor([7.0]))
    others = [torch.cat([torch.tensor(own, dtype=torch.float64), numbers + 1]) for own in ([0, 2.0, 3], [15, 1.0, 0])]

    def gather(everyone: Tensor, mine: Tensor) -> None:
        everyone.copy_(torch.cat([mine, *others]))

    monkeypatch.setattr(heartbeat.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(heartbeat.dist, "all_gather_into_tensor", gather)
    beat = Heartbeat(torch.device("cpu")).exchange(0, 0.5, 1, numbers)
    assert (beat.signal, beat.recompiled) == (15, [1, 3, 0])
    assert beat.seconds == [pytest.approx(0.5, abs=0.1), 2.0, 1.0]
    assert beat.numbers[0] == StepNumbers([0.0, 1.0, 2.0, 3.0, 4.0], StepCounts(*range(num_counts)), 7.0)
    assert [one.loss for one in beat.numbers] == [0.0, 1.0, 1.0]
