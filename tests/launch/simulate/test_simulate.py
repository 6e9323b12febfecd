"""Ranks of the recipes run at full size, and do what launch.plan predicts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.composition.compose import compose_size
from launch.simulate.compare import Compared
from launch.simulate.job import SimulatedJob, simulate_job
from tests.helpers.processes import ROOT, rank_environment
from tests.kernels.processes import find_reason_to_skip

pytestmark = pytest.mark.skipif(find_reason_to_skip() is not None, reason=str(find_reason_to_skip()))
NUM_GPUS = 256
MEMORY_TOLERANCE, FLOPS_TOLERANCE = 0.02, 0.01
# Nearly every token is masked, and so scored: the most that can be, as planned.
EVERY_TOKEN = "stage.noise_epsilon=0.9999"
RECIPES = [f"nld_{size}_{stage}" for size in ("3b", "8b", "14b") for stage in ("ar", "joint", "sft")]
SEQUENCE_PARALLEL = "parallel.sequence_parallel=true"
LAYOUTS = {
    "context ranks": ["experiment=nld_3b_joint", "parallel.context_parallel=2"],
    "elementwise": [
        *("experiment=nld_8b_joint", "parallel.tensor_parallel=2", SEQUENCE_PARALLEL),
        "parallel.recompute=elementwise",
    ],
    "selective, no sequence parallelism": [
        *("experiment=nld_8b_joint", "parallel.tensor_parallel=4", "parallel.sequence_parallel=false"),
        "parallel.recompute=selective",
    ],
    "full": ["experiment=nld_8b_sft", "parallel.tensor_parallel=4", "parallel.recompute=full"],
    "interleaved pipeline": [
        *("experiment=nld_14b_joint", "parallel.tensor_parallel=4", "parallel.pipeline_parallel=2"),
        "parallel.virtual_pipeline_parallel=2",
    ],
    "no overlap": [
        *("experiment=nld_14b_ar", "parallel.tensor_parallel=2", "parallel.pipeline_parallel=4"),
        *("parallel.overlap_grad_reduce=false", "parallel.overlap_param_gather=false"),
    ],
    "four context ranks, selective": [
        *("experiment=nld_8b_joint", "parallel.tensor_parallel=2", SEQUENCE_PARALLEL),
        *("parallel.context_parallel=4", "parallel.recompute=selective"),
    ],
    "context ranks, full": [
        *("experiment=nld_14b_sft", "parallel.tensor_parallel=4", "parallel.context_parallel=2"),
        "parallel.recompute=full",
    ],
}


def list_wrong(job: SimulatedJob) -> list[str]:
    """Return the figures that are not as planned, and what else is wrong."""
    figures = [(rank, figure) for rank, compared in job.compared.items() for figure in compared]
    wrong = [f"rank {rank}: {figure}" for rank, figure in figures if not is_as_planned(figure)]
    return wrong + [str(fault) for fault in job.faults]


def is_as_planned(figure: Compared) -> bool:
    if figure.unit == "times":
        return figure.simulated == figure.planned
    if figure.name == "peak memory":
        return abs(figure.difference) <= MEMORY_TOLERANCE
    # Messages of the head hold the scored positions of one microbatch, of which the plan knows the mean.
    return abs(figure.difference) <= (FLOPS_TOLERANCE if figure.unit == "FLOPs" else 1e-3)


def test_a_rank_of_the_real_job_does_what_is_planned(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.simulate", "experiment=nld_14b_joint", EVERY_TOKEN]
    command += ["--gpus", str(NUM_GPUS), "--ranks", "3", "--json", "--picture", str(tmp_path / "memory.png")]
    done = subprocess.run(command, env=rank_environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    job: dict[str, Any] = json.loads(done.stdout)
    for figure in job["compared"]["3"]:
        del figure["difference"]
        assert is_as_planned(Compared(**figure)), figure
    (rank,) = job["ranks"]
    assert rank["place"] == {"tensor": 3, "context": 0, "data": 0, "pipeline": 0}
    step = rank["step"]
    assert step["peak_at"]["phase"] == "forward 2"
    assert step["peak_at"]["line"].startswith("model/megatron/head.py:")
    assert step["largest"][0]["module"] == "layer.mlp.linear_fc1"
    assert sum(step["kinds"].values()) == step["peak"]
    assert rank["evaluation"]["peak"] < step["peak"]
    assert rank["saved_bytes"] > 0
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_does_what_is_planned(recipe: str) -> None:
    assert list_wrong(simulate_job(compose_size([f"experiment={recipe}", EVERY_TOKEN]), NUM_GPUS)) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts_do_what_is_planned(name: str) -> None:
    assert list_wrong(simulate_job(compose_size([*LAYOUTS[name], EVERY_TOKEN]), NUM_GPUS)) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", [{"document_tokens": 100_000}, {"document_tokens": 700, "scored_share": 0.3}])
def test_ragged_sequences_run(options: dict[str, Any]) -> None:
    """Documents longer than a sequence; packed chats with prompts, padding and completed blocks."""
    assert simulate_job(compose_size(["experiment=nld_8b_sft"]), NUM_GPUS, ranks="0", **options).faults == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_microbatches_without_a_scored_position_run_on_every_stage() -> None:
    config = compose_size(["experiment=nld_14b_sft", "parallel.tensor_parallel=4", "parallel.pipeline_parallel=2"])
    job = simulate_job(config, NUM_GPUS, scored_share=0.0)
    assert job.faults == []
    assert [report.scored_positions for report in job.reports] == [0, 0]


@pytest.mark.slow
def test_a_plan_is_checked_by_simulation() -> None:
    command = [sys.executable, "-m", "launch.plan", "experiment=nld_3b_joint", "--gpus", "8", "--check", "--json"]
    done = subprocess.run(command, env=rank_environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    checked = json.loads(done.stdout)["check"]
    assert checked["faults"] == []
    assert {"name", "simulated", "planned", "difference", "unit"} == set(checked["compared"]["0"][0])
