"""metrics.jsonl survives kills and resumes."""

from pathlib import Path

from pretrain.metrics import METRICS_FILE, MetricsWriter, load_metrics
from pretrain.reporters import TensorBoardReporter


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
