"""Faults that only a GPU would show are found without one, each with its line."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from conf.composition.compose import compose_size
from conf.schema import RunConfig
from launch.simulate.faults import find_faults
from launch.simulate.job import shorten_step
from launch.simulate.ranks import Simulation
from tests.helpers import faulty_rank
from tests.helpers.faulty_rank import FAULTS
from tests.kernels.processes import find_reason_to_skip

pytestmark = pytest.mark.skipif(find_reason_to_skip() is not None, reason=str(find_reason_to_skip()))
OVERRIDES = ["model=tiny", "stage=joint", "precision=bf16", "train.tokens=1e6", "train.global_batch_size=4"]
PIPELINE = ["parallel.pipeline_parallel=2", "model.num_layers=2"]


def line_of(mark: str) -> str:
    """Return `file:number` of the line that is marked `fault: <mark>`."""
    path = Path(faulty_rank.__file__)
    (number,) = (n for n, line in enumerate(path.read_text().splitlines(), 1) if line.endswith(f"# fault: {mark}"))
    return f"tests/helpers/{path.name}:{number}"


def simulate(config: RunConfig, fault: str) -> list[str]:
    """Simulate the last pipeline stage, or both where they must disagree."""
    ranks = [0, 1] if fault == "collective" else [1]
    reports = Simulation(config, 2, module=("tests.helpers.faulty_rank", fault)).run(ranks)
    return [str(found) for found in find_faults(reports)]


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    """Return what is found of each fault; the jobs are simulated side by side."""
    config = shorten_step(compose_size([*OVERRIDES, *PIPELINE]), 2, None)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FAULTS, pool.map(partial(simulate, config), FAULTS), strict=True))


def test_a_hidden_question_is_counted(found: dict[str, list[str]]) -> None:
    assert found["item"] == [f"{line_of('item')}: the host waits for its device, 2 times a step; nothing explains it"]


def test_a_tensor_of_the_cpu_among_those_of_the_device_is_named(found: dict[str, list[str]]) -> None:
    (fault,) = found["cpu"]
    assert fault.startswith(f"{line_of('cpu')}: rank 1: ")
    assert "found at least two devices, cuda:0 and cpu" in fault


def test_formats_that_do_not_multiply_are_named(found: dict[str, list[str]]) -> None:
    (fault,) = found["dtype"]
    assert fault.startswith(f"{line_of('dtype')}: rank 1: ")
    assert "torch.float32 and torch.bfloat16" in fault


def test_a_collective_that_one_pipeline_stage_skips_is_named(found: dict[str, list[str]]) -> None:
    (fault,) = found["collective"]
    assert fault.startswith("pretrain/step/schedule.py:")
    assert "of ranks 0 and 1 is all-reduce of 40 bytes on rank 0, " in fault
