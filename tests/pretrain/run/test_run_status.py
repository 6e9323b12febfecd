"""status.json: what it says, and that a run goes on without it."""

import json
from pathlib import Path

import pytest

from conf.system.errors import UserError
from pretrain.run.run_status import STATUS_FILE, KernelCounts, RunPhase, TrainState, load_status, write_status


def test_the_latest_status_is_what_is_read(tmp_path: Path) -> None:
    assert load_status(tmp_path) is None
    write_status(tmp_path, RunPhase.running, TrainState(3, 30, 6))
    write_status(tmp_path, RunPhase.stopped, TrainState(4, 40, 8), "SIGUSR1")
    found = load_status(tmp_path)
    assert found is not None
    assert (found.state, found.step, found.tokens_seen, found.reason) == ("stopped", 4, 40, "SIGUSR1")


def test_kernels_are_part_of_it_and_a_status_of_before_has_none(tmp_path: Path) -> None:
    write_status(tmp_path, RunPhase.running, TrainState(3, 30, 6), kernels=KernelCounts(14, 2, 31.0, 1))
    found = load_status(tmp_path)
    assert found is not None and found.kernels == KernelCounts(14, 2, 31.0, 1)
    values = json.loads((tmp_path / STATUS_FILE).read_text())
    del values["kernels"]
    (tmp_path / STATUS_FILE).write_text(json.dumps(values))
    found = load_status(tmp_path)
    assert found is not None and (found.step, found.kernels) == (3, KernelCounts())


def test_a_disk_that_takes_no_status_is_a_warning(tmp_path: Path, caplog) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    write_status(tmp_path / "run", RunPhase.running, TrainState())
    assert "cannot be written" in caplog.text


def test_a_damaged_status_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / STATUS_FILE).write_text("{")
    with pytest.raises(UserError, match=r"status\.json is damaged"):
        load_status(tmp_path)
