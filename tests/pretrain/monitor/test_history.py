"""metrics.jsonl is read once, as it grows, whatever happens to it."""

from pretrain.monitor.history import MetricsFollower
from pretrain.run.metrics import MetricsWriter
from pretrain.run.run_folder import METRICS_FILE
from tests.pretrain.monitor.conftest import RunFolder


def test_new_lines_are_added_and_a_half_written_one_waits(folder: RunFolder) -> None:
    follower = MetricsFollower(folder.path)
    follower.read()  # nothing there yet
    folder.add_steps(range(1, 4))
    with (folder.path / METRICS_FILE).open("a") as file:
        file.write('{"kind": "train", "step": 4, "loss": 1')
    follower.read()
    assert list(follower.history.train["step"]) == [1, 2, 3]
    with (folder.path / METRICS_FILE).open("a") as file:
        file.write(".25}\n")
    follower.read()
    follower.read()
    assert list(follower.history.train["step"]) == [1, 2, 3, 4]
    assert follower.history.train.last("loss") == 1.25 and follower.num_damaged == 0


def test_a_run_that_went_back_is_read_anew(folder: RunFolder) -> None:
    folder.add_steps(range(1, 11))
    folder.add("event", 10, event="spike", message="high")
    follower = MetricsFollower(folder.path)
    follower.read()
    writer = MetricsWriter(folder.path, step=6)
    writer.write("train", 7, 7, {"loss": 3.0})
    writer.close()
    follower.read()
    assert list(follower.history.train["step"]) == [1, 2, 3, 4, 5, 6, 7]
    assert [event["message"] for event in follower.history.events] == ["high"]  # what happened stays known


def test_damaged_lines_and_unknown_kinds_are_passed_over(folder: RunFolder) -> None:
    with (folder.path / METRICS_FILE).open("w") as file:
        file.write('\0\0\0\n[1]\n\n{"kind": "else"}\n{"kind": "train", "step": 1, "loss": null, "lr": "x"}\n')
    follower = MetricsFollower(folder.path)
    follower.read()
    assert follower.num_damaged == 2 and len(follower.history.train) == 1
    assert follower.history.train.last("loss") is None and not follower.history.train.has("lr")
