"""Numbers reach TensorBoard and Weights & Biases (offline: nothing leaves the machine)."""

import sys
from pathlib import Path

import pytest

from conf.errors import UserError
from pretrain.reporters import open_reporters


def test_weights_and_biases_gets_numbers_and_configuration(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = {"schedule": {"peak_lr": 0.125}}
    (reporter,) = open_reporters(tmp_path, 0, tensorboard=False, wandb_project="toy", config=config)
    reporter.report({"train/loss": 0.625, "train/skipped": 0}, 1)
    reporter.report({"train/loss": 0.5}, 1)  # a resumed run comes back to earlier steps
    reporter.close()
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = written.read_bytes()
    assert all(text in content for text in (b"train/loss", b"0.625", b"train/skipped", b"peak_lr", b"toy"))


def test_without_the_package_there_is_one_clear_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"runtime\.wandb_project is set and wandb is not installed"):
        open_reporters(tmp_path, 0, tensorboard=False, wandb_project="toy")


def test_nothing_is_opened_that_was_not_asked_for(tmp_path: Path) -> None:
    assert open_reporters(tmp_path, 0, tensorboard=False) == []
    assert not list(tmp_path.iterdir())
