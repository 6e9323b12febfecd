"""A drafter trains alike on one process and under every ZeRO level, and continues exactly where it was killed.

What ends one rank ends all of them.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.toy.corpus import write_jsonl
from model.checkpoint.checksums import find_damage
from pretrain.run.run_folder import lock_run_folder
from tests.helpers.processes import kill_when, load_lines, run_ranks, train_many
from tests.helpers.tiny_exports import TEXT, save_tiny_export

STEPS = 6
WORKER = "tests.helpers.drafter_jobs"
SECONDS_APART = 20  # ranks that wait in vain end after 60 (tests/helpers/failing_drafter.py)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder with an export and texts of different lengths."""
    folder = tmp_path_factory.mktemp("start")
    save_tiny_export(folder / "export")
    sentences = TEXT.split(". ")
    write_jsonl(
        ({"text": ". ".join(sentences[i % 5 :] * (1 + i % 3)) + str(i)} for i in range(40)), folder / "texts.jsonl"
    )
    return folder


def overrides(start: Path, run_dir: Path, *extra: str) -> list[str]:
    return [
        f"checkpoint={start}/export",
        f"data={start}/texts.jsonl",
        f"output={run_dir}/adapter",
        f"run.dir={run_dir}",
        "adapter.rank=4",
        "adapter.alpha=16",
        f"train.steps={STEPS}",
        "train.global_batch_size=4",
        "train.micro_batch_size=1",
        "train.sequence_length=64",
        "train.blocks_per_sequence=6",
        "schedule.peak_lr=1e-2",
        "evaluation.every_steps=3",
        "evaluation.share=0.2",
        "checkpointing.every_steps=2",
        "runtime.dtype=fp32",
        "runtime.device=cpu",
        "runtime.loss_chunk_blocks=4",
        "runtime.progress_bar=false",
        "runtime.tensorboard=false",
        *extra,
    ]


def read_losses(run_dir: Path) -> torch.Tensor:
    """Return [steps + evaluations]: losses of training, acceptance held out."""
    losses = [line["loss"] for line in load_lines(run_dir, "train")]
    assert len(losses) == STEPS
    return torch.tensor(losses + [line["acceptance_length_sampled"] for line in load_lines(run_dir, "heldout")])


@pytest.fixture(scope="module")
def single(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in one process, with nothing sharded."""
    root = tmp_path_factory.mktemp("single")
    train_many(1, [overrides(start, root / "run", "zero.stage=0")], root, WORKER)
    return root / "run"


@pytest.fixture(scope="module")
def sharded(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in two processes: runs zero0 ... zero3, offload and bf16."""
    root = tmp_path_factory.mktemp("sharded")
    jobs = {f"zero{stage}": [f"zero.stage={stage}"] for stage in range(4)}
    jobs["offload"] = ["zero.stage=3", "zero.offload_optimizer=true", "zero.offload_parameters=true"]
    jobs["bf16"] = ["zero.stage=2", "runtime.dtype=bf16"]
    train_many(2, [overrides(start, root / name, *extra) for name, extra in jobs.items()], root, WORKER)
    return root


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "offload"])
def test_every_zero_stage_follows_the_curve_of_one_process_to_the_same_adapter(
    single: Path, sharded: Path, name: str
) -> None:
    expected = read_losses(single)
    assert expected[0] != expected[STEPS - 1]
    assert torch.allclose(read_losses(sharded / name), expected, rtol=1e-4)
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (single, sharded / name)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(value.any() for value in adapters[0].values())
    for key, value in adapters[0].items():
        assert (adapters[1][key] - value).norm() <= 1e-3 * value.norm(), key


def test_a_bf16_model_trains_an_fp32_adapter_along_nearly_the_same_curve(single: Path, sharded: Path) -> None:
    assert torch.allclose(read_losses(sharded / "bf16"), read_losses(single), rtol=0.05)
    adapter = load_file(sharded / "bf16" / "adapter" / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 for value in adapter.values())


def test_killed_while_it_trains_it_continues_to_the_same_bits(start: Path, sharded: Path, tmp_path: Path) -> None:
    arguments = overrides(start, tmp_path / "run", "zero.stage=2")
    kill_when("checkpoints/step_00000004", tmp_path / "run", 2, "lora.train", arguments)
    assert not (tmp_path / "run" / "adapter").exists()
    train_many(2, [arguments], tmp_path, WORKER)
    undisturbed = sharded / "zero2"
    assert torch.equal(read_losses(tmp_path / "run"), read_losses(undisturbed))
    ours, theirs = (run / "adapter" / "adapter_model.safetensors" for run in (tmp_path / "run", undisturbed))
    assert ours.read_bytes() == theirs.read_bytes()


def read_errors(run_dir: Path, num_ranks: int = 2) -> set[str]:
    """Return the errors that the users of all ranks saw; check that all ranks ended within seconds."""
    times = [float((run_dir / f"time_rank{rank}.txt").read_text()) for rank in range(num_ranks)]
    assert max(times) - min(times) < SECONDS_APART
    return {(run_dir / f"error_rank{rank}.txt").read_text(encoding="utf-8") for rank in range(num_ranks)}


def train_failing(jobs: list[dict[str, Any]], directory: Path) -> None:
    (directory / "failing.json").write_text(json.dumps(jobs), encoding="utf-8")
    run_ranks(2, "tests.helpers.failing_drafter", str(directory / "failing.json"))


def test_a_folder_in_use_ends_every_rank_with_the_one_message(start: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with lock_run_folder(run_dir):
        train_failing([{"overrides": overrides(start, run_dir)}], tmp_path)
    (message,) = read_errors(run_dir)
    assert f"{run_dir} is in use by another run (process {os.getpid()} on" in message
    assert not (run_dir / "checkpoints").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_fails_on_every_rank_and_leaves_the_run_as_it_was(
    start: Path, sharded: Path, tmp_path: Path, rank: int
) -> None:
    arguments = overrides(start, tmp_path / "run", "zero.stage=2")
    train_failing([{"overrides": arguments, "rank": rank, "step": 4}], tmp_path)
    (message,) = read_errors(tmp_path / "run")
    assert "step_00000004: " in message and "No space left on device" in message
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]
    assert find_damage(checkpoints / "step_00000002") is None
    assert not (tmp_path / "run" / "adapter").exists()
    train_many(2, [arguments], tmp_path, WORKER)
    assert torch.equal(read_losses(tmp_path / "run"), read_losses(sharded / "zero2"))


def test_training_leaves_every_byte_of_the_checkpoint_alone(start: Path, single: Path, tmp_path: Path) -> None:
    assert single.exists()
    untouched = save_tiny_export(tmp_path / "export")
    for path in (start / "export").iterdir():
        assert path.read_bytes() == (untouched / path.name).read_bytes(), path.name


def test_the_adapter_says_what_it_was_trained_with(single: Path) -> None:
    record = json.loads((single / "adapter" / "drafter.json").read_text())
    assert record["step"] == STEPS
    assert (record["rank"], record["alpha"], record["block_size"]) == (4, 16, 8)
    assert record["versions"].keys() == {"torch", "transformers", "peft", "deepspeed"}
