"""Losses are read from the runs, and become a picture; a missing run is named."""

import pytest
from PIL import Image

from conf.system.errors import UserError
from launch.quickstart.folder import QuickstartFolder
from launch.quickstart.loss_curves import draw_curves, load_curves, moving_average


def test_curves_hold_training_and_heldout_lines_apart(finished_folder: QuickstartFolder) -> None:
    curves = load_curves("joint", finished_folder.run("joint"))
    assert [entry["step"] for entry in curves.train] == [10, 20, 30, 40]
    assert [entry["ar_loss"] for entry in curves.heldout] == [2.8, 2.6, 2.4, 2.3, 2.2]


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value() -> None:
    assert moving_average([3.0] * 20) == pytest.approx([3.0] * 20)
    assert moving_average([5.0, 1.0])[0] == pytest.approx(5.0)
    assert 1.0 < moving_average([5.0, 1.0])[1] < 5.0


def test_a_stage_that_has_not_run_is_named(folder: QuickstartFolder) -> None:
    with pytest.raises(UserError, match="joint stage has not run"):
        load_curves("joint", folder.run("joint"))


def test_a_run_without_evaluations_is_refused(finished_folder: QuickstartFolder) -> None:
    path = finished_folder.run("ar") / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "heldout" not in line))
    with pytest.raises(UserError, match="lacks training or held-out losses"):
        load_curves("ar", finished_folder.run("ar"))


def test_the_picture_is_a_readable_png(finished_folder: QuickstartFolder) -> None:
    stages = [load_curves(stage, finished_folder.run(stage)) for stage in ("ar", "joint")]
    draw_curves(stages, 4.1, finished_folder.curves)
    with Image.open(finished_folder.curves) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 600
        assert len(set(image.convert("RGB").resize((200, 120)).tobytes())) > 20, "something is drawn"
