"""Killed at any moment, a run continues and reproduces the undisturbed one: bit for bit, or 1e-5 in another layout."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.helpers.layouts import PP2, TP2_SP
from tests.helpers.processes import kill_tree, kill_when, load_lines, train_many
from tests.helpers.toy_data import ToyData, tokens_of

STEPS = 12


def overrides(data: ToyData, root: Path, name: str, *extra: str, chats: bool = False) -> list[str]:
    """Return the overrides of a joint run of 12 steps that saves every fourth; with chats, one of instruct tuning."""
    where = [f"run.root={root}", f"run.name={name}", f"stage={'sft' if chats else 'joint'}"]
    return [*data.overrides(chats), *where, tokens_of(STEPS, chats), "checkpoint.every_steps=4", *extra]


def curve(run_dir: Path) -> list[tuple[object, ...]]:
    """Return everything of a step that must be reproduced."""
    keys = ("step", "tokens_seen", "loss", "ar_loss", "diffusion_loss", "masking_ratio", "grad_norm", "lr")
    train = [tuple(line[key] for key in keys) for line in load_lines(run_dir, "train")]
    heldout = [(line["step"], line["loss"], line["ar_loss"]) for line in load_lines(run_dir, "heldout")]
    assert [line[0] for line in train] == list(range(1, STEPS + 1))
    return train + heldout


@pytest.fixture(scope="module")
def undisturbed(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the run nobody kills, under pipeline parallelism 2."""
    root = tmp_path_factory.mktemp("undisturbed")
    train_many(2, [overrides(toy_data, root, "run", *PP2)], root)
    return root / "run"


def test_killed_during_a_checkpoint_write_it_resumes_bit_for_bit(
    undisturbed: Path, toy_data: ToyData, tmp_path: Path
) -> None:
    arguments = overrides(toy_data, tmp_path, "run", *PP2)
    kill_when("checkpoints/step_00000008.partial", tmp_path / "run", 2, "pretrain.train", arguments)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*4")] == ["step_00000004"]
    assert not (tmp_path / "run" / "checkpoints" / "step_00000008").exists()
    train_many(2, [arguments], tmp_path)
    assert curve(tmp_path / "run") == curve(undisturbed)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step_00000008",
        "step_00000012",
    ]


def test_killed_during_training_it_resumes_under_other_layouts(
    undisturbed: Path, toy_data: ToyData, tmp_path: Path
) -> None:
    """PP2 killed after step 4, then TP2 for four steps, then one process: optimizer state crosses two reshards."""
    arguments = overrides(toy_data, tmp_path, "run")
    kill_when("checkpoints/step_00000004", tmp_path / "run", 2, "pretrain.train", [*arguments, *PP2])
    kill_when("checkpoints/step_00000008", tmp_path / "run", 2, "pretrain.train", [*arguments, *TP2_SP])
    train_many(1, [[*arguments, "parallel=single"]], tmp_path)
    for mine, its in zip(curve(tmp_path / "run"), curve(undisturbed), strict=True):
        assert mine[:3] == pytest.approx(its[:3], rel=1e-5)


def test_a_blend_of_packed_chats_resumes_bit_for_bit_in_bf16_after_an_asynchronous_save(
    toy_data: ToyData, tmp_path: Path
) -> None:
    sources = {"some": (toy_data.train_chats, 3), "others": (toy_data.heldout_chats, 1)}
    blend = ", ".join(f"{name}: {{path: {path}, weight: {weight}}}" for name, (path, weight) in sources.items())
    same = ["parallel=single", "precision=bf16", f"data.train={{{blend}}}"]
    whole = overrides(toy_data, tmp_path, "whole", *same, chats=True)
    arguments = overrides(toy_data, tmp_path, "run", *same, "checkpoint.asynchronous=true", chats=True)
    train_many(2, [whole], tmp_path)
    kill_when("checkpoints/step_00000008", tmp_path / "run", 2, "pretrain.train", arguments)
    train_many(2, [arguments], tmp_path)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_a_finished_run_started_again_changes_nothing(undisturbed: Path, toy_data: ToyData) -> None:
    def content() -> tuple[list[str], dict[str, float]]:
        lines = (undisturbed / "metrics.jsonl").read_text().splitlines()
        files = {str(path): path.stat().st_mtime for path in (undisturbed / "checkpoints").rglob("*")}
        return [line for line in lines if json.loads(line)["kind"] != "restore"], files

    before = content()
    train_many(2, [overrides(toy_data, undisturbed.parent, "run", *PP2)], undisturbed.parent)
    assert content() == before


def test_sigkill_reaches_real_processes() -> None:
    """The helper itself: a killed tree is gone."""
    process = subprocess.Popen(["sleep", "60"])
    kill_tree(process.pid)
    assert process.wait() == -signal.SIGKILL
    assert not os.path.exists(f"/proc/{process.pid}/exe")
