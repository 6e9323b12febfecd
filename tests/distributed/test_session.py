"""The ranks of a run agree: whatever fails on one of two real processes ends on both at once, with one message."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint.checksums import find_damage
from pretrain.run.run_folder import lock_run_folder
from tests.helpers.processes import run_ranks

WORKER = "tests.helpers.session_jobs"
SECONDS = 10.0  # ranks that wait for each other would take the group's timeout of 60


def run_jobs(root: Path, *jobs: dict[str, Any]) -> None:
    (root / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    run_ranks(2, WORKER, str(root / "jobs.json"))


def outcomes(run_dir: Path, action: str) -> list[dict[str, Any]]:
    """Return the outcomes of rank 0 and rank 1."""
    return [json.loads((run_dir.parent / f"outcome_{action}_rank{rank}.json").read_text()) for rank in range(2)]


def assert_failed_alike(run_dir: Path, action: str) -> str:
    """Check that both ranks failed with one message, and return it."""
    first, second = outcomes(run_dir, action)
    assert first["error"] == second["error"]
    assert first["error"] is not None
    assert max(first["seconds"], second["seconds"]) < SECONDS
    return first["error"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the jobs that leave the folders in_use, saved, manifest, metrics and signal."""
    root = tmp_path_factory.mktemp("sessions")
    for name in ("in_use", "saved", "manifest", "metrics", "signal"):
        (root / name).mkdir()
    with lock_run_folder(root / "in_use" / "run"):
        run_jobs(
            root,
            {"run_dir": f"{root}/in_use/run", "action": "enter", "rank": 0},
            {"run_dir": f"{root}/saved/run", "action": "save", "rank": 0},
            {"run_dir": f"{root}/saved/run", "action": "write", "rank": 1},
            {"run_dir": f"{root}/manifest/run", "action": "save", "rank": 0},
            {"run_dir": f"{root}/manifest/run", "action": "manifest", "rank": 0},
            {"run_dir": f"{root}/metrics/run", "action": "metrics", "rank": 0},
            {"run_dir": f"{root}/signal/run", "action": "signal", "rank": 1},
        )
    return root


def test_a_folder_in_use_ends_every_rank_at_once_with_the_same_message(root: Path) -> None:
    assert "is in use by another run (process" in assert_failed_alike(root / "in_use" / "run", "enter")


@pytest.mark.parametrize(("folder", "action"), [("saved", "write"), ("manifest", "manifest")])
def test_a_write_that_fails_on_one_rank_fails_the_save_on_all_and_leaves_nothing_half_written(
    root: Path, folder: str, action: str
) -> None:
    message = assert_failed_alike(root / folder / "run", action)
    assert message.startswith("SaveError: cannot write checkpoint")
    assert "No space left on device" in message
    (earlier,) = (root / folder / "run" / "checkpoints").iterdir()
    assert earlier.name == "step_00000001"
    assert find_damage(earlier) is None
    assert {path.name for path in earlier.iterdir()} == {"part_0", "part_1", "checkpoint.json", "SHA256SUMS"}


def test_metrics_that_cannot_be_opened_end_every_rank(root: Path) -> None:
    assert "metrics.jsonl" in assert_failed_alike(root / "metrics" / "run", "metrics")


def test_a_signal_of_one_rank_is_every_ranks(root: Path) -> None:
    assert [outcome["found"] for outcome in outcomes(root / "signal" / "run", "signal")] == ["SIGUSR1", "SIGUSR1"]
