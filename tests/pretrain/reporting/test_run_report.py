"""A run reports its steps."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from conf.schema import ModelConfig
from pretrain.reporting import run_report as module
from pretrain.reporting.run_report import RunReport
from pretrain.run.process_group import Ranks
from pretrain.run.run_status import RunPhase, TrainState, load_status


def build_report(run_dir: Path) -> RunReport:
    """Build the report of rank 0 with a silent terminal."""
    silent = SimpleNamespace(write=lambda *values: None, update=lambda *values: None)
    ranks = Ranks(0, 1, torch.device("cpu"))
    session: Any = SimpleNamespace(run_dir=run_dir, ranks=ranks, metrics=silent, progress_bar=lambda title: silent)
    config: Any = SimpleNamespace(
        stage=SimpleNamespace(name="joint"),
        runtime=SimpleNamespace(log_every_steps=1000),
        model=ModelConfig("toy", 1, 8, 16, 1, 1, 8, 32),
    )
    stragglers: Any = SimpleNamespace(compare=lambda seconds: {}, update=lambda ratios, step: [])
    return RunReport(config, session, stragglers)


def test_a_phase_is_written_at_once_and_a_running_run_now_and_then(tmp_path: Path, monkeypatch) -> None:
    clock = iter([100.0, 101.0, 111.0, 111.0, 112.0, 113.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(RunReport, "_describe_step", lambda *values: {"loss": 1.0, "tokens_per_second": 1.0})
    outcome: Any = SimpleNamespace(beat=SimpleNamespace(seconds=[1.0]))
    report = build_report(tmp_path)
    report.write_phase(RunPhase.running, TrainState(0))
    seen = []
    for step in (1, 2, 3):
        report.write_step(TrainState(step), outcome, None)  # type: ignore[arg-type]
        found = load_status(tmp_path)
        assert found is not None
        seen.append(found.step)
    report.write_phase(RunPhase.stopped, TrainState(3), "SIGUSR1")
    found = load_status(tmp_path)
    assert found is not None
    assert (seen, found.state, found.step) == ([0, 2, 2], "stopped", 3)
