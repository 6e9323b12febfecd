"""A step of the draft adapter's training runs on fake tensors; what is held follows from the configuration."""

import json
import subprocess
import sys
from typing import Any

import pytest

from conf.composition.compose import compose_size
from launch.simulate.drafter import shard
from tests.helpers.processes import ROOT, rank_environment
from tests.kernels.processes import find_reason_to_skip

pytestmark = pytest.mark.skipif(find_reason_to_skip() is not None, reason=str(find_reason_to_skip()))
SMALL = ["adapter.rank=8", "train.sequence_length=256", "train.blocks_per_sequence=4"]


def simulate(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "launch.simulate.drafter", "--json", "--gpus", "4", *arguments]
    done = subprocess.run(command, env=rank_environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_weights_adapter_gradients_and_state_are_those_of_the_configuration() -> None:
    result = simulate("--model", "tiny", *SMALL)
    step, model = result["step"], compose_size(["model=tiny", "train.tokens=1e6"]).model
    assert step["trainable"] == model.num_layers * 8 * (model.query_width + model.hidden_size)
    assert step["kinds"]["adapter"] == step["kinds"]["gradients"] == 4 * step["trainable"]
    assert step["kinds"]["optimizer"] == 8 * step["trainable"]
    # In bf16; the frequencies of the rotation are no parameters.
    assert step["kinds"]["weights"] == pytest.approx(2 * model.num_parameters, rel=1e-3)
    assert step["questions"] == []
    assert result["zero"][0]["total"] == step["peak"]


def test_zero_shards_the_state_then_gradients_then_weights() -> None:
    kinds = {"weights": 400, "adapter": 40, "gradients": 40, "optimizer": 80}
    recorded = {"kinds": kinds, "peak": 600}
    assert [shard(recorded, level, 4).total for level in range(4)] == [600, 540, 510, 180]


@pytest.mark.slow
def test_recomputing_layers_frees_what_they_save() -> None:
    peaks = [
        simulate("--model", "ministral3_8b", *more)["step"]["peak"]
        for more in ([], ["runtime.gradient_checkpointing=true"])
    ]
    assert peaks[1] < peaks[0] - 8 * 2**30
