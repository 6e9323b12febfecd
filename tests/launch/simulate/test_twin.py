"""What is simulated is what happens: live bytes, collectives and FLOPs of real gloo processes, rank by rank."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.composition.compose import compose_size
from launch.simulate.device_kind import KINDS
from launch.simulate.fake_device import fake_cuda_environment
from pretrain.run.run_folder import write_out
from tests.helpers.layouts import CP2, PP2_INTERLEAVED, TP2, TP2_SP
from tests.helpers.processes import ROOT, rank_environment, run_ranks
from tests.kernels.processes import find_reason_to_skip

pytestmark = pytest.mark.skipif(find_reason_to_skip() is not None, reason=str(find_reason_to_skip()))
NUM_RANKS = 2
COMMON = [
    *("model=tiny", "precision=bf16", "train.tokens=1e6", "train.global_batch_size=4", "data.sequence_length=512"),
    *("stage.block_size=32", "model.num_layers=4", "runtime.loss_chunk_rows=128"),
]
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
CASES = {
    "joint_tp2_sp": ["stage=joint", *TP2_SP],
    "joint_pp2_interleaved_full": ["stage=joint", *PP2_INTERLEAVED, "parallel.recompute=full"],
}
MORE_CASES = {
    "ar_tp2_selective": ["stage=ar", *TP2, "parallel.recompute=selective"],
    "joint_cp2_elementwise": ["stage=joint", *CP2, "parallel.recompute=elementwise"],
    "joint_dp2_overlap": ["stage=joint", *OVERLAP, "parallel.bucket_parameters=20000"],
    "ar_pp2": ["stage=ar", "parallel.pipeline_parallel=2", "train.micro_batch_size=2"],
}


def record_both(cases: dict[str, list[str]], folder: Path) -> dict[str, list[tuple[Any, Any]]]:
    """Return for each case and rank what was recorded of the real rank and of the fake one."""
    for name, overrides in cases.items():
        (folder / f"{name}.yaml").write_text(write_out(compose_size([*COMMON, *overrides])), encoding="utf-8")
    module = "tests.helpers.simulated_step"
    with fake_cuda_environment(KINDS["h100"]) as fake:
        environment = fake | rank_environment() | {"TORCHDYNAMO_DISABLE": "1"}
        for rank in range(NUM_RANKS):
            options = ["fake", str(folder), "--rank", str(rank), "--gpus", str(NUM_RANKS)]
            done = subprocess.run(
                [sys.executable, "-m", module, *options], env=environment, cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-6000:]
    run_ranks(NUM_RANKS, module, "real", str(folder), TORCHDYNAMO_DISABLE="1")

    def read(name: str, rank: int) -> tuple[Any, Any]:
        paths = (folder / f"{name}_{device}_{rank}.json" for device in ("real", "fake"))
        real, fake = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
        return real, fake

    return {name: [read(name, rank) for rank in range(NUM_RANKS)] for name in cases}


def check_equal(real: Any, fake: Any) -> None:
    for kind in ("weights", "gradients"):
        assert fake["kinds"][kind] == real["kinds"][kind]
    # In a run on CPUs Adam's counters, one number per parameter, are on the device, too.
    assert fake["kinds"]["optimizer"] == pytest.approx(real["kinds"]["optimizer"], abs=4 * 100)
    of_step = [recording["peak"] - recording["before"] for recording in (real, fake)]
    # Mostly equal to the byte; but what gloo is still sending lives until its thread is done with it.
    assert of_step[1] == pytest.approx(of_step[0], rel=0.03)
    assert fake["flops"] == real["flops"]
    assert [list_call(item) for item in fake["collectives"]] == [list_call(item) for item in real["collectives"]]


def list_call(item: dict[str, Any]) -> tuple[Any, ...]:
    return item["operation"], tuple(item["ranks"]), item["num_bytes"]


def test_live_bytes_collectives_and_flops_are_those_of_a_real_job(tmp_path: Path) -> None:
    for ranks in record_both(CASES, tmp_path).values():
        for real, fake in ranks:
            check_equal(real, fake)


@pytest.mark.slow
def test_so_they_are_in_other_layouts(tmp_path: Path) -> None:
    for ranks in record_both(MORE_CASES, tmp_path).values():
        for real, fake in ranks:
            check_equal(real, fake)
