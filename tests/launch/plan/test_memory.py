"""Predicted bytes are compared with live tensors and collectives of real training steps."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from conf.composition.compose import compose_size
from conf.schema import RunConfig
from launch.plan import activations
from launch.plan import vision as plan_of_vision
from launch.plan.communication import estimate_traffic
from launch.plan.hardware_profile import HardwareProfile
from launch.plan.layout_plan import plan_layout
from launch.plan.memory import PipelineStageMemory, estimate_memory
from launch.plan.rank_shape import build_rank_shape
from model.attention import grouped
from model.megatron import head, vision
from tests.helpers.layouts import CP2, PP2, PP2_INTERLEAVED, TP2, TP2_SP
from tests.helpers.layouts import LAYOUTS as LAYOUTS_BY_NAME
from tests.helpers.plan_jobs import IMAGES
from tests.helpers.processes import run_ranks

NUM_RANKS = 2
TOLERANCE = 0.10
# A share of noise of nearly one masks every token: the most that can be scored, as planned.
COMMON = ["model=tiny", "runtime=cpu", "train.tokens=1e6", "stage.noise_epsilon=0.9999"]
COMMON += [
    "model.num_layers=2",
    "train.global_batch_size=4",
    "data.sequence_length=256",
    "stage.block_size=32",
    "runtime.loss_chunk_rows=128",
]
DEEP_TOWER = ["model=tiny_vlm", "model.vision.num_layers=96"]
JOBS = {
    "ar_fp32": ["stage=ar", "parallel=single", "precision=fp32"],
    "joint_bf16": ["stage=joint", "parallel=single", "precision=bf16", "train.micro_batch_size=2"],
    "joint_bf16_selective": ["stage=joint", "parallel=single", "precision=bf16", "parallel.recompute=selective"],
    "joint_bf16_elementwise": ["stage=joint", "parallel=single", "precision=bf16", "parallel.recompute=elementwise"],
    "ar_bf16_vocabulary": ["stage=ar", "parallel=single", "precision=bf16", "model.vocab_size=16384"],
    "joint_fp32_tp2_vocabulary": ["stage=joint", *TP2, "precision=fp32", "model.vocab_size=16384"],
    "joint_bf16_tp2_sp": ["stage=joint", *TP2_SP, "precision=bf16"],
    "ar_fp32_tp2_sp_full": ["stage=ar", *TP2_SP, "precision=fp32", "parallel.recompute=full"],
    "joint_fp32_tp2_sp_elementwise": [
        "stage=joint",
        *TP2_SP,
        "precision=fp32",
        "parallel.recompute=elementwise",
    ],
    "joint_bf16_pp2": ["stage=joint", *PP2, "precision=bf16"],
    "ar_fp32_cp2": ["stage=ar", *CP2, "precision=fp32", "train.micro_batch_size=2"],
    "joint_bf16_cp2_selective": ["stage=joint", *CP2, "precision=bf16", "parallel.recompute=selective"],
    "joint_fp32_cp2_full": ["stage=joint", *CP2, "precision=fp32", "parallel.recompute=full"],
    "vlm_fp32": ["stage=vlm", "model=tiny_vlm", "parallel=single", "precision=fp32"],
    "vlm_bf16_deep_tower": [
        "stage=vlm",
        "model=tiny_vlm",
        "parallel=single",
        "precision=bf16",
        "model.vision.num_layers=48",
    ],
    "vlm_bf16_tp2_sp": ["stage=vlm", "model=tiny_vlm", *TP2_SP, "precision=bf16"],
    "vlm_fp32_cp2": ["stage=vlm", "model=tiny_vlm", *CP2, "precision=fp32"],
    "vlm_bf16_pp2": ["stage=vlm", "model=tiny_vlm", *PP2, "precision=bf16", "precision.vision=bf16"],
    "ar_fp32_pp2_interleaved": ["stage=ar", *PP2_INTERLEAVED, "precision=fp32", "model.num_layers=4"],
}
LAYOUTS = {
    **{option: LAYOUTS_BY_NAME[option] for option in ("tp2", "tp2_sp", "pp2")},
    # Long enough for activations to outweigh the buffers of gloo's collectives.
    **{option: [*LAYOUTS_BY_NAME[option], "data.sequence_length=512"] for option in ("single", "cp2")},
    "pp2_interleaved": [*PP2_INTERLEAVED, "model.num_layers=4"],
}
EVERY = {
    "_".join(case): [f"stage={case[0]}", *LAYOUTS[case[1]], f"precision={case[2]}", f"parallel.recompute={case[3]}"]
    for case in product(("ar", "joint"), LAYOUTS, ("fp32", "bf16"), ("none", "elementwise", "selective", "full"))
}
Measured = dict[str, list[dict[str, Any]]]


def measure(jobs: dict[str, list[str]], folder: Path, timeout: float) -> Measured:
    """Measure every job by rank, in one set of processes."""
    path = folder / "jobs.json"
    path.write_text(json.dumps({name: [*COMMON, *overrides] for name, overrides in jobs.items()}), encoding="utf-8")
    run_ranks(NUM_RANKS, "tests.helpers.plan_jobs", str(path), str(folder), timeout=timeout)
    files = {name: [folder / f"{name}_rank{rank}.json" for rank in range(NUM_RANKS)] for name in jobs}
    return {name: [json.loads(file.read_text(encoding="utf-8")) for file in ranks] for name, ranks in files.items()}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measure(JOBS, tmp_path_factory.mktemp("plan"), timeout=240)


def predict(name: str, jobs: dict[str, list[str]] = JOBS) -> tuple[RunConfig, list[PipelineStageMemory]]:
    """Return the configuration of a job and the memory of each rank: a pipeline stage each, or all alike."""
    config = compose_size([*COMMON, *jobs[name]])
    stages = estimate_memory(build_rank_shape(config, NUM_RANKS, kind=IMAGES))
    return config, stages if len(stages) == NUM_RANKS else stages * NUM_RANKS


def test_sizes_of_the_models_operators_are_theirs() -> None:
    """The plan must not import torch, so it repeats constants of the model."""
    assert plan_of_vision.PATCHES_TOGETHER == vision.PATCHES_TOGETHER
    assert (activations.TILE_COLUMNS, activations.GROUP_SIZE) == (head.TILE_COLUMNS, grouped.GROUP_SIZE)


@pytest.mark.parametrize("name", JOBS)
def test_weights_gradients_and_optimizer_are_exact(name: str, measured: Measured) -> None:
    config, stages = predict(name)
    for stage, found in zip(stages, measured[name], strict=True):
        assert stage.weights == found["weights"]
        # megatron-core pads the ends of its buffers, and gives each data-parallel rank whole elements.
        assert 0 <= found["gradients"] - stage.gradients <= 4 * 256 * config.parallel.virtual_pipeline_parallel
        assert abs(found["optimizer"] - stage.optimizer) <= 12 * 256


@pytest.mark.parametrize("name", JOBS)
def test_activations_and_logits_are_within_a_tenth(name: str, measured: Measured) -> None:
    for stage, found in zip(predict(name)[1], measured[name], strict=True):
        assert stage.transient == pytest.approx(found["transient"], rel=TOLERANCE)


def test_logits_are_a_large_part_where_the_vocabulary_is() -> None:
    for name in ("ar_bf16_vocabulary", "joint_fp32_tp2_vocabulary"):
        last = predict(name)[1][-1]
        assert last.logits > 0.25 * last.transient


@pytest.mark.parametrize("name", JOBS)
def test_messages_of_collectives_are_counted(name: str, measured: Measured) -> None:
    config, _ = predict(name)
    predicted: dict[str, int] = {}
    for item in estimate_traffic(build_rank_shape(config, NUM_RANKS, kind=IMAGES)):
        predicted[item.operation] = predicted.get(item.operation, 0) + item.num_bytes
    for collective, bytes_ in predicted.items():
        found = max(rank["sent"].get(collective, 0) for rank in measured[name])
        assert bytes_ == pytest.approx(found, rel=0.05), collective  # norms, counts and maxima are left out


@pytest.mark.parametrize("name", JOBS)
def test_a_checkpoint_has_the_predicted_size(name: str, measured: Measured) -> None:
    plan = plan_layout(predict(name)[0], NUM_RANKS, HardwareProfile())
    assert plan.checkpoint_bytes == pytest.approx(measured[name][0]["checkpoint"], rel=0.01)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_combination_is_within_a_tenth(tmp_path: Path) -> None:
    found = measure(EVERY, tmp_path, timeout=1700)
    wrong = []
    for name in EVERY:
        for stage, rank in zip(predict(name, EVERY)[1], found[name], strict=True):
            if stage.transient != pytest.approx(rank["transient"], rel=TOLERANCE) or stage.weights != rank["weights"]:
                wrong.append(f"{name}: predicted {stage.transient}, found {rank['passing']}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "elementwise", "selective", "full"])
@pytest.mark.parametrize("stage", ["ar", "joint"])
def test_the_gpus_kernels_keep_what_is_predicted(stage: str, recompute: str) -> None:
    from tests.helpers.plan_jobs import measure_step

    overrides = [f"stage={stage}", "model=ministral3_3b", "model.num_layers=4", f"parallel.recompute={recompute}"]
    config = compose_size([*overrides, "train.tokens=1e9", "train.global_batch_size=2", "stage.noise_epsilon=0.9999"])
    found = measure_step(config)
    (predicted,) = estimate_memory(build_rank_shape(config, 1))
    assert predicted.weights == found["weights"]
    assert predicted.transient == pytest.approx(found["transient"], rel=TOLERANCE)
