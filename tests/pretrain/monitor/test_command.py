"""The monitor prints and draws what it read."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from pretrain.monitor.__main__ import main
from pretrain.monitor.plot import smooth, thin
from pretrain.monitor.text import draw_sparkline, format_bytes, format_count, format_seconds
from tests.pretrain.monitor.conftest import RunFolder


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["monitor", *map(str, words)])
    with pytest.raises(SystemExit) as status:
        main()
    return int(status.value.code or 0)


def test_one_look_says_where_the_run_stands(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    folder.add_steps(range(1, 41))
    folder.add_checkpoint(40)
    folder.add("checkpoint", 40, saved_step=40, save_seconds=0.5, write_seconds=2.5, bytes=1000)
    folder.set_status()
    assert run(monkeypatch, folder.path, "--once") == 0
    shown = capsys.readouterr().out
    for text in ("toy  running", "step 40/100", "40.0%", "2 min left", "loss", "4.2000", "MFU 41.0%", "step 40, "):
        assert text in shown
    assert "training waited 0.5 s · complete after 2.5 s" in shown and "!" not in shown
    assert "kernels" not in shown  # a run on CPUs compiles none


def test_compiled_kernels_are_shown(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    kernels = {"compiled_kernels": 14, "loaded_kernels": 2, "compile_seconds": 31.0, "recompiled_kernels": 0}
    folder.set_status(kernels=kernels)
    assert run(monkeypatch, folder.path, "--once") == 0
    shown = capsys.readouterr().out
    assert "14 compiled, 2 from the cache · 31 s since the start · none after the first steps" in shown


def test_the_picture_is_drawn_with_and_without_events(folder: RunFolder, monkeypatch, tmp_path: Path, capsys) -> None:
    path = tmp_path / "pictures" / "run.png"
    assert run(monkeypatch, folder.path, "--once", "--png", path) == 0  # nothing to draw yet
    empty = image.imread(path)
    folder.add_steps(range(1, 2001))
    folder.add_steps([2001], loss=None, ar_loss=None)
    folder.add("heldout", 1000, ar_loss=4.0)
    folder.add("restore", 500, restore_seconds=1)
    for event in ("spike", "save_failed", "something new"):
        folder.add("event", 700, event=event, message="")
    assert run(monkeypatch, folder.path, "--once", "--png", path) == 0
    full = image.imread(path)
    assert min(full.shape[:2]) > 800 and (full[..., :3] < 0.9).sum() > 2 * (empty[..., :3] < 0.9).sum()
    assert [file.name for file in path.parent.iterdir()] == ["run.png"]


@pytest.mark.parametrize("what", ["nowhere", ".", "file"])
def test_a_folder_that_is_no_run_is_one_message(tmp_path: Path, monkeypatch, capsys, what: str) -> None:
    (tmp_path / "file").touch()
    assert run(monkeypatch, tmp_path / what) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_runs_below_the_folder_are_named(folder: RunFolder, monkeypatch, capsys) -> None:
    assert run(monkeypatch, folder.path.parent, "--once") == 2
    assert "runs below it: toy" in capsys.readouterr().err


def test_it_needs_no_torch() -> None:
    code = "import sys, pretrain.monitor.__main__, pretrain.monitor.plot; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_sparkline_follows_the_means_and_leaves_gaps() -> None:
    assert draw_sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert draw_sparkline([1, 1, float("nan"), 3, 3], 5) == "▁▁ ██"
    assert draw_sparkline([], 5) == "" and draw_sparkline([float("nan")], 5) == " "
    assert len(draw_sparkline(range(1000), 48)) == 48


def test_bins_keep_means_and_extremes() -> None:
    x = np.arange(10000.0)
    y = np.where(x == 5000, 100.0, 1.0)
    curve = thin(x, y, points=100)
    assert len(curve.x) == 100 and curve.high.max() == 100 and curve.y.mean() == pytest.approx(y.mean())
    assert np.allclose(smooth(np.ones(57)), 1) and np.allclose(smooth(np.arange(300.0)), np.arange(300))


def test_numbers_are_short() -> None:
    assert [format_count(value) for value in (12, 12345, 1.5e9)] == ["12", "12.3k", "1.5B"]
    assert [format_bytes(value) for value in (12, 1.5e9, 2e12)] == ["12 B", "1.5 GB", "2 TB"]
    durations = [format_seconds(value) for value in (0.44, 59.6, 125, 7300, 90061)]
    assert durations == ["0.4 s", "1 min", "2 min 5 s", "2 h 1 min", "1 d 1 h"]
