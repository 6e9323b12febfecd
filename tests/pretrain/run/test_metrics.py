"""metrics.jsonl survives kills and resumes."""

import errno
import math
import os
from io import FileIO
from pathlib import Path

from pretrain.run import metrics
from pretrain.run.metrics import METRICS_FILE, MetricsWriter, load_metrics
from pretrain.run.reporters import TensorBoardReporter


def test_lines_after_the_resumed_step_and_cut_lines_are_dropped(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, step=0)
    for step in range(1, 6):
        writer.write("train", step, step * 10, {"loss": 1.0 / step, "diffusion_loss": None})
    writer.write("heldout", 3, 30, {"loss": 0.5})
    writer.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"kind": "train", "st')
    resumed = MetricsWriter(tmp_path, step=3)
    resumed.write("train", 4, 40, {"loss": 0.25})
    resumed.close()
    assert [line["step"] for line in load_metrics(tmp_path, "train")] == [1, 2, 3, 4]
    assert [line["step"] for line in load_metrics(tmp_path, "heldout")] == [3]


def test_tensorboard_gets_every_value(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, step=0, reporters=[TensorBoardReporter(tmp_path, 0)])
    for step in (1, 2):
        writer.write("train", step, step, {"loss": 1.0 / step, "mfu": None})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [1.0, 0.5]
    assert "train/mfu" not in events.Tags()["scalars"]


def test_what_the_disk_does_not_take_is_written_as_soon_as_it_does(tmp_path: Path, monkeypatch, caplog) -> None:
    class SmallDisk(FileIO):
        """Takes 150 bytes, and the last of them only in part."""

        room = 150

        def write(self, content) -> int:
            taken = super().write(content[: SmallDisk.room])
            SmallDisk.room -= taken
            if taken < len(content) and not taken:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return taken

    monkeypatch.setattr(metrics, "FileIO", SmallDisk)
    writer = MetricsWriter(tmp_path, step=0)
    for step in range(1, 6):
        writer.write("train", step, step, {"loss": 1.0 / step})
    assert 0 < len(load_metrics(tmp_path, "train")) < 5
    assert caplog.text.count("cannot be written") == 1
    SmallDisk.room = 10_000
    writer.write("train", 6, 6, {"loss": 0.125})
    writer.close()
    assert [line["step"] for line in load_metrics(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]


def test_events_stay_when_a_run_goes_back(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, step=0)
    for step in (1, 2, 3):
        writer.write("train", step, step, {"loss": 1.0})
    writer.write("event", 3, 3, {"event": "spike", "message": "loss 9"})
    writer.drop_after(1)
    writer.write("train", 2, 2, {"loss": math.nan})
    writer.close()
    assert [(line["step"], line["loss"]) for line in load_metrics(tmp_path, "train")] == [(1, 1.0), (2, None)]
    assert [line["message"] for line in load_metrics(tmp_path, "event")] == ["loss 9"]
