"""Ranks that disagree, questions that nothing explains, and errors are found; ranks that agree are left alone."""

from dataclasses import replace

import pytest

from launch.simulate.collectives import Collective
from launch.simulate.faults import EXPLAINED_QUESTIONS, find_faults
from launch.simulate.live_memory import NOWHERE
from launch.simulate.rank_report import RankReport, Recording
from launch.simulate.step_recorder import Question

STEP = Recording(0, 0, NOWHERE, {}, {}, [], [], [], [], {})
REDUCE = Collective("all-reduce", (0, 1), 40, "schedule.py:54")
GATHER = Collective("all-gather", (0, 1), 80, "heartbeat.py:61")


def reports_of(*calls: list[Collective]) -> list[RankReport]:
    return [RankReport(rank, step=replace(STEP, collectives=own)) for rank, own in enumerate(calls)]


def test_ranks_that_call_the_same_are_left_alone() -> None:
    other_group = Collective("all-reduce", (0, 2), 8, "elsewhere.py:1")
    assert find_faults(reports_of([REDUCE, other_group, SEND, GATHER], [REDUCE, RECEIVE, GATHER])) == []


SEND, RECEIVE = Collective("send", (0, 1), 16, "p2p.py:1"), Collective("receive", (0, 1), 16, "p2p.py:2")
HANGS = "number {number} of ranks 0 and 1, rank {missing} does not: the job would hang"
DIFFERENCES = [
    (
        [REDUCE, GATHER],
        [GATHER],
        "schedule.py:54",
        "number 1 of ranks 0 and 1 is all-reduce of 40 bytes on rank 0, all",
    ),
    ([GATHER], [GATHER, REDUCE], "schedule.py:54", HANGS.format(number=2, missing=0)),
    ([REDUCE], [replace(REDUCE, num_bytes=48)], "schedule.py:54", "all-reduce of 48 bytes on rank 1"),
    ([SEND], [], "p2p.py:1", HANGS.format(number=1, missing=1)),
    ([], [RECEIVE], "p2p.py:2", HANGS.format(number=1, missing=0)),
]


@pytest.mark.parametrize(("mine", "theirs", "line", "message"), DIFFERENCES)
def test_the_first_difference_is_named(mine: list, theirs: list, line: str, message: str) -> None:
    (fault,) = find_faults(reports_of(mine, theirs))
    assert fault.line == line
    assert message in fault.message


def test_a_question_is_found_unless_it_is_explained() -> None:
    known = Question("a.py:1", next(iter(EXPLAINED_QUESTIONS)), "prepare")
    hidden = Question("b.py:2", "b.py:surprise", "forward 1")
    step = replace(STEP, questions=[known, hidden, hidden])
    (fault,) = find_faults([RankReport(0, step=step), RankReport(1, step=step)])
    assert str(fault) == "b.py:2: the host waits for its device, 2 times a step; nothing explains it"


def test_an_error_comes_first_and_has_its_line() -> None:
    (fault,) = find_faults([RankReport(3, error="RuntimeError: no", error_line="c.py:3")])
    assert str(fault) == "c.py:3: rank 3: RuntimeError: no"
