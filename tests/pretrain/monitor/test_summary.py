"""The summary shows where a run stands, and what is worth a person's look."""

import os
import subprocess
import time
from typing import Any

import pytest

from pretrain.monitor import folder as folder_module
from pretrain.monitor.alerts import find_alerts
from pretrain.monitor.folder import view_run_folder
from pretrain.monitor.history import MetricsFollower
from pretrain.monitor.summary import Summary, summarise
from tests.pretrain.monitor.conftest import RunFolder


def look(folder: RunFolder) -> tuple[Summary, list[str]]:
    follower = MetricsFollower(folder.path)
    follower.read()
    view = view_run_folder(folder.path)
    summary = summarise(view, follower.history, time.time())
    return summary, find_alerts(view, follower.history, summary, follower.num_damaged)


def test_a_healthy_run_is_summarised_without_alerts(folder: RunFolder) -> None:
    folder.add_steps(range(1, 41))
    folder.add("heldout", 40, loss=4.5, ar_loss=4.1, diffusion_loss=6.2)
    folder.add_checkpoint(30, num_bytes=5000)
    folder.add("checkpoint", 30, saved_step=30, save_seconds=0.5, write_seconds=2.5, bytes=5000)
    for number in range(3):
        folder.add_start(number)
    folder.set_status()
    summary, alerts = look(folder)
    assert alerts == []
    assert (summary.state, summary.step, summary.tokens_seen) == ("running", 40, 40 * 512)
    assert summary.progress == pytest.approx(0.4) and summary.eta_seconds == pytest.approx(60 * 2.0)
    assert summary.data_share == pytest.approx(0.05) and summary.mfu == pytest.approx(0.41)
    assert summary.useful_share == pytest.approx(0.9)
    assert (summary.rank_imbalance, summary.undealt_rank_imbalance) == (1.02, 1.3)
    assert summary.restarts == 2 and summary.save["save_seconds"] == 0.5
    metrics = {metric.name: metric for metric in summary.metrics}
    assert metrics["loss"].value == pytest.approx(4.2) and metrics["ar_loss"].heldout == 4.1
    assert "acceptance_length" not in metrics


def test_a_folder_without_status_runs_while_it_is_written_to(folder: RunFolder) -> None:
    folder.add_steps(range(1, 3))
    assert look(folder)[0].state == "running"
    hour_ago = time.time() - 3600
    os.utime(folder.path / "metrics.jsonl", (hour_ago, hour_ago))
    summary, alerts = look(folder)
    assert summary.state == "unknown" and summary.age_seconds == pytest.approx(3600, abs=60) and not alerts


def test_a_run_before_its_first_step_has_unknown_numbers(folder: RunFolder) -> None:
    summary, alerts = look(folder)
    assert (summary.step, summary.eta_seconds, summary.metrics, alerts) == (0, None, (), [])
    assert summary.progress == 0


def test_the_run_of_a_drafter_counts_steps(folder: RunFolder) -> None:
    (folder.path / "config.yaml").write_text("train: {steps: 50, global_batch_size: 8}\nrun: {name: d}\n")
    for step in range(1, 26):
        folder.add("train", step, loss=1.0, acceptance_length=2.5, step_seconds=4.0)
    summary, alerts = look(folder)
    assert summary.progress == 0.5 and summary.eta_seconds == 100 and not alerts
    assert [metric.name for metric in summary.metrics] == ["loss", "acceptance_length"]


@pytest.mark.parametrize(
    ("event", "named"),
    [
        ({"event": "spike", "message": "loss 9 is a spike"}, "loss 9 is a spike"),
        ({"event": "nonfinite", "message": "loss nan"}, "nonfinite at step 39: loss nan"),
        ({"event": "rollback", "message": "back from step 39"}, "back from step 39"),
        ({"event": "corrupt_checkpoint", "message": "step 20"}, "corrupt checkpoint at step 39"),
        ({"event": "straggler", "message": "rank 3 takes 2.0 times as long"}, "rank 3"),
        ({"event": "recompiled", "message": "rotate_heads was compiled again"}, "step 39: rotate_heads"),
        ({"event": "save_failed", "message": "No space left"}, "the last save failed (step 39): No space left"),
    ],
)
def test_events_become_alerts(folder: RunFolder, event: dict[str, Any], named: str) -> None:
    folder.add_steps(range(1, 41))
    folder.add_checkpoint(30)
    folder.add("event", 39, **event)
    (alert,) = look(folder)[1]
    assert named in alert


def test_old_events_and_saves_that_worked_later_are_no_alerts(folder: RunFolder) -> None:
    folder.add_steps(range(1, 1041))
    folder.add("event", 100, event="spike", message="long ago")
    folder.add("event", 1000, event="save_failed", message="disk")
    folder.add("event", 1010, event="stop", message="SIGTERM")
    folder.add_checkpoint(1020)
    assert look(folder)[1] == []


def test_repeated_events_are_one_alert_with_their_number(folder: RunFolder) -> None:
    folder.add_steps(range(1, 41))
    for step in (20, 30, 35):
        folder.add("event", step, event="spike", message="high")
    assert "spike at step 35 (3 times" in look(folder)[1][0]


def test_silence_is_an_alert_while_the_run_is_said_to_be_running(folder: RunFolder) -> None:
    folder.add_steps(range(1, 41), step_seconds=20.0)
    folder.set_status(age=90)
    assert look(folder)[1] == []  # less than five steps
    folder.set_status(age=120)
    assert "no sign of life for 2 min" in look(folder)[1][0]
    folder.set_status("stopped", age=120)
    assert look(folder)[1] == []


def test_a_process_that_is_gone_and_a_failure_are_alerts(folder: RunFolder) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    folder.add_steps(range(1, 41))
    folder.set_status(pid=ended.pid)
    assert f"process {ended.pid} is gone" in look(folder)[1][0]
    folder.set_status(pid=ended.pid, host="another")
    assert look(folder)[1] == []
    folder.set_status("failed", reason="out of memory")
    assert look(folder)[1] == ["it failed: out of memory"]


def test_waiting_for_data_and_a_rank_that_is_always_slow_are_alerts(folder: RunFolder) -> None:
    folder.add_steps(range(1, 41), data_seconds=0.8, slowest_rank=17, slowest_ratio=1.8)
    alerts = look(folder)[1]
    assert "40% of the time is spent waiting for data" in alerts[0]
    assert "rank 17" in alerts[1] and "1.8 times" in alerts[1]


def test_a_disk_without_room_for_the_next_checkpoint_is_an_alert(folder: RunFolder, monkeypatch) -> None:
    folder.add_steps(range(1, 41))
    folder.add_checkpoint(30, num_bytes=5000)
    free = type("Usage", (), {"free": 4000})
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: free)
    assert "the next checkpoint needs 5 kB, 4 kB are free" in look(folder)[1][0]


def test_broken_status_and_configuration_leave_things_unknown(folder: RunFolder) -> None:
    folder.add_steps(range(1, 3))
    (folder.path / "status.json").write_text('{"state": "run')
    (folder.path / "config.yaml").write_text("train: [")
    summary, _ = look(folder)
    assert summary.step == 2 and summary.progress is None
