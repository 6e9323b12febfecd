"""What a run reports of its steps."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pretrain.reporting import report as module
from pretrain.reporting.report import RunReport
from pretrain.run.process_group import Ranks
from pretrain.run.run_status import RunPhase, TrainState, load_status


def build_report(run_dir: Path, **parts: Any) -> RunReport:
    """One of rank 0 with a silent console."""
    ranks = Ranks(0, 1, torch.device("cpu"))
    session: Any = SimpleNamespace(
        run_dir=run_dir, ranks=ranks, metrics=SimpleNamespace(write=lambda *values: None), **parts
    )
    console: Any = SimpleNamespace(say_step=lambda *values: None)
    return RunReport(SimpleNamespace(), session, console)  # type: ignore[arg-type]


def test_a_phase_is_written_at_once_and_a_running_run_now_and_then(tmp_path: Path, monkeypatch) -> None:
    clock = iter([100.0, 101.0, 111.0, 111.0, 112.0, 113.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(RunReport, "_describe", lambda *values: {})
    report = build_report(tmp_path)
    report.say_phase(RunPhase.running, TrainState(0))
    seen = []
    for step in (1, 2, 3):
        report.say_step(TrainState(step), None, None)  # type: ignore[arg-type]
        found = load_status(tmp_path)
        assert found is not None
        seen.append(found.step)
    report.say_phase(RunPhase.stopped, TrainState(3), "SIGUSR1")
    found = load_status(tmp_path)
    assert found is not None
    assert (seen, found.state, found.step) == ([0, 2, 2], "stopped", 3)
