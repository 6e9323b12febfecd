"""Training on a CUDA device: the same losses as on the CPU, with whatever layers and attention the device brings."""

import os
from pathlib import Path

import pytest

from tests.helpers.processes import load_lines, train_many
from tests.helpers.toy_data import ToyData, tokens_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("stage", ["ar", "joint", "sft"])
def test_the_gpu_trains_like_the_cpu(
    toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    data = [*toy_data.overrides(chats=stage == "sft"), tokens_of(5, chats=stage == "sft")]
    shared = [*data, "runtime.device=auto", f"stage={stage}", f"run.root={tmp_path}"]
    train_many(1, [[*shared, "run.name=gpu"], [*shared, "run.name=gpu_bf16", "precision=bf16"]], tmp_path / "gpu_jobs")
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    train_many(1, [[*shared, "run.name=cpu"]], tmp_path / "cpu_jobs")
    expected = [line["loss"] for line in load_lines(tmp_path / "cpu", "train")]
    assert [line["loss"] for line in load_lines(tmp_path / "gpu", "train")] == pytest.approx(expected, rel=2e-3)
    assert [line["loss"] for line in load_lines(tmp_path / "gpu_bf16", "train")] == pytest.approx(expected, rel=3e-2)
