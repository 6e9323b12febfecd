"""status.json: what it says, and how often it is written."""

from pathlib import Path

import pytest

from conf.system.errors import UserError
from pretrain.run import status
from pretrain.run.status import RunPhase, StatusWriter, load_status


def test_a_phase_is_written_at_once_and_a_running_run_now_and_then(tmp_path: Path, monkeypatch) -> None:
    assert load_status(tmp_path) is None
    clock = iter([100.0, 101.0, 111.0, 112.0, 113.0])
    monkeypatch.setattr(status.time, "monotonic", lambda: next(clock))
    writer = StatusWriter(tmp_path)
    seen = []
    for step, phase in enumerate([RunPhase.running] * 4 + [RunPhase.stopped]):
        writer.write(phase, step, step * 10, "SIGUSR1" if phase is RunPhase.stopped else "")
        found = load_status(tmp_path)
        assert found is not None
        seen.append((found.state, found.step, found.reason))
    assert seen == [*[("running", 0, "")] * 2, *[("running", 2, "")] * 2, ("stopped", 4, "SIGUSR1")]


def test_a_damaged_status_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / status.STATUS_FILE).write_text("{")
    with pytest.raises(UserError, match=r"status\.json is damaged"):
        load_status(tmp_path)
