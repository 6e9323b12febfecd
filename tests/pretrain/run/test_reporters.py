"""Numbers reach TensorBoard and Weights & Biases (offline: nothing leaves the machine)."""

import sys
import time
from pathlib import Path

import pytest

from conf.system.errors import UserError
from pretrain.run.reporters import open_reporters


def test_weights_and_biases_gets_numbers_and_configuration(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = {"schedule": {"peak_lr": 0.125}}
    (reporter,) = open_reporters(tmp_path, 0, tensorboard=False, wandb_project="toy", config=config)
    for step in (1, 2, 3, 4, 2, 3, 4, 5):  # a resumed run comes back to earlier steps
        reporter.report({"train/loss": 1 / step, "train/skipped": 0}, step)
    reporter.close()
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20  # its own process writes, a little later on a busy machine
    while b"peak_lr" not in (content := written.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    # A log of records in blocks, whose edges may cut a few names.
    assert content.count(b"train/loss") >= 6
    assert content.count(b"train/skipped") >= 6
    assert b"peak_lr" in content


def test_without_the_package_there_is_one_clear_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"runtime\.wandb_project is set and wandb is not installed"):
        open_reporters(tmp_path, 0, tensorboard=False, wandb_project="toy")


def test_nothing_is_opened_that_was_not_asked_for(tmp_path: Path) -> None:
    assert open_reporters(tmp_path, 0, tensorboard=False) == []
    assert not list(tmp_path.iterdir())
