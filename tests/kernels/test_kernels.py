"""Every kernel of a run on CUDA compiles for Hopper and Blackwell, and computes what float64 does, on a CPU alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.simulate.device_kind import KINDS
from tests.kernels.cases import SAME_PROGRAMS, list_large_cases, list_small_cases
from tests.kernels.golden import (
    compare_table_rows,
    find_newest_table,
    find_table,
    load_table,
    make_table_rows,
)
from tests.kernels.judge import find_faults
from tests.kernels.processes import Outcome, find_reason_to_skip, lower_cases, try_cases_in_parallel

pytestmark = pytest.mark.skipif(find_reason_to_skip() is not None, reason=str(find_reason_to_skip()))
# In `make test`: joint attention of a 14B rank and one form of rotation, compiled; packed chats and others interpreted.
QUICK = (
    "attention/joint/14b_tp8",
    "attention/joint_chats_each/small",
    "rotation/keys_each/small",
    "swiglu/megatron/small",
)
SMALL = [case.name for case in list_small_cases()]
LARGE = [case.name for case in list_large_cases()]


def assert_right(kind: str, outcomes: dict[str, Outcome]) -> None:
    faults = find_faults(kind, outcomes)
    assert not faults, "\n".join(faults)


def assert_no_worse_than_the_table(kind: str, outcomes: dict[str, Outcome]) -> None:
    path = find_newest_table(kind)
    assert path is not None, f"no table of {kind}: make test-kernels ARGS=--write"
    worse = compare_table_rows(make_table_rows(outcomes), load_table(path))
    assert not worse, "\n".join(worse)


def test_a_few_kernels_compile_as_before_and_compute_the_right_numbers() -> None:
    outcomes = try_cases_in_parallel("h100", QUICK, interpreted=True)
    assert_right("h100", outcomes)
    interpreted = [name for name in QUICK if name in SMALL]
    assert len(interpreted) == 3
    for name in interpreted:
        assert len(outcomes[name].errors or {}) >= 2, "output and gradients are compared"
    compiled = {name: outcomes[name] for name in QUICK if name in LARGE}
    assert_no_worse_than_the_table("h100", compiled)
    [attention] = compiled.values()
    assert sum(kernel.tensor_core > 0 for kernel in attention.kernels) >= 2, "forward and backward multiply"


def test_the_table_has_all_cases() -> None:
    assert {row.case for row in load_table(find_table("h100"))} == set(LARGE)
    # Of B200 the others are judged, and compared once they are written (README.md).
    attention = {name for name in LARGE if name.startswith("attention/") and name.endswith(("3b_tp1", "8b_tp4"))}
    assert attention <= {row.case for row in load_table(find_table("b200"))} <= set(LARGE)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_all_kernels_compile_as_before(kind: str) -> None:
    outcomes = try_cases_in_parallel(kind, LARGE, interpreted=False)
    assert_right(kind, outcomes)
    assert_no_worse_than_the_table(kind, outcomes)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_kernels_compute_what_float64_does() -> None:
    outcomes = try_cases_in_parallel("h100", SMALL, interpreted=True)
    assert_right("h100", outcomes)
    assert all(outcome.errors for outcome in outcomes.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_is_compiled_small_alone_has_the_programs_of_another_case(tmp_path: Path) -> None:
    partners = {f"{one}small": f"{other}small" for one, other in SAME_PROGRAMS.items()}
    another = "attention/joint_chats_one/small"
    lower_cases("h100", [*partners, *partners.values(), another], tmp_path / "lowered.pt")
    lowered = torch.load(tmp_path / "lowered.pt", weights_only=False)
    programs = {name: read_programs(case) for name, case in lowered.items()}
    for one, other in partners.items():
        assert len(programs[one]) == 3, "of the BlockMask, the forward and the backward"
        assert programs[one] == programs[other], one
    assert programs[another] != programs["attention/joint/small"]


def read_programs(lowered: dict[str, Any]) -> list[list[str]]:
    """Return the lines of inductor's programs without comments, which name folders and numbers of compilations."""
    texts = [step.text for step in lowered["recording"].steps if step.name is None]
    return [[line for line in text.splitlines() if not line.startswith("#")] for text in texts]
