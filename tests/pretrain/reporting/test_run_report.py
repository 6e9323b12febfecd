"""A run reports its steps."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conf.schema import ModelConfig
from pretrain.health.compilations import Compilation, CompilationCounter
from pretrain.reporting import run_report as module
from pretrain.reporting.run_report import MOST_RECOMPILATIONS, RunReport
from pretrain.run.process_group import Ranks
from pretrain.run.run_status import RunPhase, TrainState, load_status

guard: Any = None  # of which a step's description alone would take something


def late_compilation() -> Compilation:
    return Compilation("rotate_heads (rotation.py:1)", 2.0, False, "tensor 'x' size mismatch", is_late=True)


def build_report(run_dir: Path, rank: int = 0, events: list[str] | None = None) -> RunReport:
    """Build the report of a rank with a silent terminal. events: receives the messages of events."""
    seen: list[str] = [] if events is None else events

    def write(kind: str, step: int, tokens_seen: int, values: dict[str, Any]) -> None:
        seen.extend([values["message"]] if kind == "event" else [])

    silent = SimpleNamespace(write=write, update=lambda *values: None)
    ranks = Ranks(rank, 4, torch.device("cpu"))
    session: Any = SimpleNamespace(run_dir=run_dir, ranks=ranks, metrics=silent, progress_bar=lambda title: silent)
    config: Any = SimpleNamespace(
        stage=SimpleNamespace(name="joint"),
        runtime=SimpleNamespace(log_every_steps=1000),
        model=ModelConfig("toy", 1, 8, 16, 1, 1, 8, 32),
    )
    stragglers: Any = SimpleNamespace(compare=lambda seconds: {}, update=lambda ratios, step: [])
    return RunReport(config, session, stragglers, CompilationCounter())


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what came of a step, which is described without a model."""
    monkeypatch.setattr(RunReport, "_describe_step", lambda *values: {"loss": 1.0, "tokens_per_second": 1.0})
    return SimpleNamespace(beat=SimpleNamespace(seconds=[1.0], recompiled=[0, 0, 0, 0]))


def test_a_phase_is_written_at_once_and_a_running_run_now_and_then(tmp_path: Path, monkeypatch, outcome) -> None:
    clock = iter([100.0, 101.0, 111.0, 111.0, 112.0, 113.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    report = build_report(tmp_path)
    report.write_phase(RunPhase.running, TrainState(0))
    seen = []
    for step in (1, 2, 3):
        report.write_step(TrainState(step), outcome, guard)
        found = load_status(tmp_path)
        assert found is not None
        seen.append(found.step)
    report.write_phase(RunPhase.stopped, TrainState(3), "SIGUSR1")
    found = load_status(tmp_path)
    assert found is not None
    assert (seen, found.state, found.step) == ([0, 2, 2], "stopped", 3)


def test_what_was_compiled_late_is_an_event_with_its_reason_and_in_the_status(tmp_path: Path, outcome) -> None:
    events: list[str] = []
    report = build_report(tmp_path, events=events)
    report.kernels.counts.compiled_kernels = 1
    report.kernels.new = [late_compilation()]
    outcome.beat.recompiled = [1, 0, 3, 0]
    report.write_step(TrainState(30), outcome, guard)
    assert "rotate_heads (rotation.py:1) was compiled again in 2.0 s because this changed: tensor 'x'" in events[0]
    assert "rank 2 compiled 3 kernels" in events[1] and len(events) == 2
    found = load_status(tmp_path)
    assert found is not None and (found.kernels.compiled_kernels, found.kernels.recompiled_kernels) == (1, 4)


def test_another_rank_names_its_own_kernels_in_its_log(tmp_path: Path, outcome, caplog, monkeypatch) -> None:
    monkeypatch.setattr(module.logger, "propagate", True)
    report = build_report(tmp_path, rank=2)
    report.kernels.new = [late_compilation()]
    outcome.beat.recompiled = [1, 0, 1, 0]
    report.write_step(TrainState(30), outcome, guard)
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "rotate_heads" in warning and "tensor 'x' size mismatch" in warning


def test_a_run_that_compiles_at_every_step_does_not_fill_its_log(tmp_path: Path, outcome) -> None:
    events: list[str] = []
    report = build_report(tmp_path, events=events)
    outcome.beat.recompiled = [0, 1, 0, 0]
    for step in range(21, 61):
        report.write_step(TrainState(step), outcome, guard)
    assert len(events) == MOST_RECOMPILATIONS
    assert report.kernels.counts.recompiled_kernels == 40
