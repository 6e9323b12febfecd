"""The drafter's training compiles nothing on CUDA either, so that it needs no cache of compiled kernels."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.simulate.device_kind import KINDS
from launch.simulate.fake_device import fake_cuda_environment
from tests.kernels.processes import find_reason_to_skip

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(find_reason_to_skip() is not None, reason=str(find_reason_to_skip()))


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, int]]:
    command = [sys.executable, "-m", "tests.helpers.drafter_on_cuda"]
    with fake_cuda_environment(KINDS["h100"]) as environment:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("step", ["default", "verified"])
def test_a_step_runs_on_cuda_as_operators_alone(counts: dict[str, dict[str, int]], step: str) -> None:
    assert counts[step]["programs"] == 0
    assert counts[step]["operators"] > 500 and counts[step]["gradients"] == 4  # two matrices in each of two layers


def test_compiled_layers_would_be_counted(counts: dict[str, dict[str, int]]) -> None:
    assert counts["compiled"]["programs"] > 0
