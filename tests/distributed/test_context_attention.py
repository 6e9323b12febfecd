"""Attention over context-parallel ranks: the dense mask's values and gradients, the formula's bytes exactly."""

import json
from typing import Any

import pytest

from conf.compose import compose_size
from launch.plan.communication import clean_keys_bytes, estimate_traffic
from launch.plan.shape import build_shape
from tests.helpers.processes import run_ranks

LENGTH = 256
# Texts [n] and chats [context, answer, ...], two sequences each: one document; several with completions and filler.
ONE = [[[LENGTH]], [[LENGTH]]]
PACKED = [[[20, 45], [33], [40, 20]], [[100], [3, 60]]]
SIZES = (2, 4)


def job(sequences: list[list[list[int]]], block_size: int, doubled: bool, **changes: Any) -> dict[str, Any]:
    shared = {"sequences": sequences, "length": LENGTH, "block_size": block_size, "doubled": doubled}
    return {**shared, "recompute": False, "dtype": "float32", **changes}


JOBS = {
    "ar": job(ONE, 8, doubled=False),
    "ar_packed": job(PACKED, 8, doubled=False),
    "joint_8": job(ONE, 8, doubled=True),
    "joint_32": job(ONE, 32, doubled=True),
    "joint_8_packed": job(PACKED, 8, doubled=True),
    "joint_32_packed": job(PACKED, 32, doubled=True),
    "ar_packed_rounds": job(PACKED, 8, doubled=False, chunk_rows=8),
    "joint_8_packed_rounds": job(PACKED, 8, doubled=True, chunk_rows=16),
    "joint_8_recomputed": job(ONE, 8, doubled=True, recompute=True),
    "joint_8_bfloat16": job(ONE, 8, doubled=True, dtype="bfloat16"),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """By size of the group and job: what every rank found."""
    folder = tmp_path_factory.mktemp("context")
    path = folder / "jobs.json"
    path.write_text(json.dumps(dict.fromkeys(SIZES, JOBS)), encoding="utf-8")
    num_ranks = max(SIZES)
    run_ranks(num_ranks, "tests.helpers.context_jobs", str(path), str(folder))
    files = {
        size: {name: [folder / f"{size}_{name}_rank{rank}.json" for rank in range(num_ranks)] for name in JOBS}
        for size in SIZES
    }
    return {
        size: {name: [json.loads(file.read_text()) for file in ranks] for name, ranks in jobs.items()}
        for size, jobs in files.items()
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", JOBS)
def test_every_rank_computes_its_rows_of_the_dense_mask(measured: Any, name: str, size: int) -> None:
    exact = JOBS[name]["dtype"] == "float32"
    for rank in measured[size][name]:
        assert rank["output"] <= (1e-5 if exact else 0.02)
        assert rank["gradients"] <= (1e-5 if exact else 0.02)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", JOBS)
def test_the_bytes_sent_are_those_of_the_formula(measured: Any, name: str, size: int) -> None:
    job = JOBS[name]
    overrides = [
        f"stage={'joint' if job['doubled'] else 'ar'}",
        f"stage.block_size={job['block_size']}",
        f"precision={'fp32' if job['dtype'] == 'float32' else 'bf16'}",
        f"parallel.recompute={'selective' if job['recompute'] else 'none'}",
        f"parallel.context_parallel={size}",
        "train.micro_batch_size=2",
        "train.global_batch_size=2",
    ]
    config = compose_size(
        ["model=tiny", "model.num_layers=1", f"data.sequence_length={LENGTH}", "train.tokens=1e6", *overrides]
    )
    traffic = [item for item in estimate_traffic(build_shape(config, size)) if item.group == "context"]
    expected = {item.operation: item.count * item.message_bytes for item in traffic}
    assert all(rank["sent"] == expected for rank in measured[size][name])


@pytest.mark.parametrize("size", SIZES)
def test_the_joint_stage_sends_what_the_autoregressive_one_does(measured: Any, size: int) -> None:
    ar, joint = measured[size]["ar"], measured[size]["joint_8"]
    assert [rank["sent"] for rank in ar] == [rank["sent"] for rank in joint]


def test_the_message_is_clean_keys_and_values_of_whole_sequences() -> None:
    config = compose_size(["experiment=nld_8b_joint", "parallel=tp8_sp_cp4", "data.sequence_length=262144"])
    # 2 (keys, values) * 262144 tokens * 8 heads / TP 8 * 128 * 2 bytes
    assert clean_keys_bytes(build_shape(config, 32)) == 2 * 262144 * 1 * 128 * 2
