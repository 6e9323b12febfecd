"""A full disk while saving: one clear message, the earlier checkpoint intact, nothing half-written, and it resumes.

The disk is a small tmpfs, which needs root. Without root those tests say so and are skipped; the ones below them, where
the error of a full disk is injected into one rank, run for everybody.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.checkpoint.checksums import find_damage
from tests.helpers.layouts import PP2
from tests.helpers.processes import (
    ROOT,
    kill_tree,
    load_lines,
    rank_environment,
    run_ranks,
    torchrun,
    train_many,
)
from tests.helpers.toy_data import ToyData, tokens_of

# One checkpoint of the toy takes 30 MB: the first save fits, the second one does not.
DISK_SIZE = "45m"
MODULES = {"noticed_before": "pretrain.train", "met_while_writing": "tests.helpers.train_without_space_check"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a tmpfs of DISK_SIZE."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root: only injected errors are tested")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("case", MODULES)
def test_a_full_disk_leaves_the_earlier_checkpoint(toy_data: ToyData, small_disk: Path, case: str) -> None:
    where = [f"run.root={small_disk}", "run.name=run", "stage=joint", "checkpoint.every_steps=2"]
    arguments = [*toy_data.overrides(), *where, tokens_of(4), "evaluation.every_steps=0"]
    done = subprocess.run(
        torchrun(2, MODULES[case], *arguments, *PP2),
        env=rank_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode != 0
    assert len(errors) == 1, done.stderr[-4000:]
    assert "cannot write" in errors[0]
    assert "free" in errors[0]
    assert [path.name for path in (small_disk / "run" / "checkpoints").iterdir()] == ["step_00000002"]

    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    train_many(1, [[*arguments, "parallel=single"]], small_disk)
    assert [line["step"] for line in load_lines(small_disk / "run", "train")] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_with_on_failure_go_on_a_run_trains_through_a_full_disk_and_saves_when_there_is_room(
    toy_data: ToyData, small_disk: Path, asynchronous: str
) -> None:
    run_dir = small_disk / "run"
    where = [f"run.root={small_disk}", "run.name=run", "stage=joint", *PP2, tokens_of(120)]
    often = ["checkpoint.every_steps=4", "evaluation.every_steps=0", "checkpoint.on_failure=go_on"]
    arguments = [*toy_data.overrides(), *where, *often, f"checkpoint.asynchronous={asynchronous}"]
    command = torchrun(2, MODULES["met_while_writing"], *arguments)
    with subprocess.Popen(command, env=rank_environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_event(run_dir, "save_failed", process)
            subprocess.run(["mount", "-o", "remount,size=300m", str(small_disk)], check=True)
            _, errors = process.communicate(timeout=200)
        finally:
            kill_tree(process.pid)
    assert process.returncode == 0, errors[-3000:]
    failed = [line for line in load_lines(run_dir, "event") if line["event"] == "save_failed"]
    assert failed[0]["step"] <= 9, "the second checkpoint does not fit, and training went on"
    assert "earlier checkpoints are untouched" in failed[0]["message"]
    assert [line["step"] for line in load_lines(run_dir, "train")] == list(range(1, 121))
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step_00000116", "step_00000120"]
    assert not any(map(find_damage, (run_dir / "checkpoints").iterdir()))


def wait_for_event(run_dir: Path, event: str, process: subprocess.Popen[str]) -> None:
    """Wait until a run has written an event down."""
    deadline = time.monotonic() + 200
    while not (run_dir / "metrics.jsonl").exists() or event not in (run_dir / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, f"no {event}"
        time.sleep(0.02)


# Which file of which rank cannot be written (tests/helpers/failing_disk.py), and how the run saves.
FEW = (("writer", 1, "true"), ("metadata", 0, "false"))
MORE = (
    *(("writer", rank, kind) for rank in (0, 1) for kind in ("true", "false") if (rank, kind) != (1, "true")),
    *(("config", 0, kind) for kind in ("true", "false")),
    *(("manifest", 0, kind) for kind in ("true", "false")),
    ("metadata", 0, "true"),
)


@pytest.mark.parametrize("cases", [FEW, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "more"])
def test_a_disk_full_for_one_rank_fails_the_save_on_all_and_the_next_one_works(
    toy_data: ToyData, tmp_path: Path, cases: tuple[tuple[str, int, str], ...]
) -> None:
    """No rank is left waiting in a collective that the others never enter."""
    run_with_faults(toy_data, tmp_path, cases, "checkpoint.on_failure=go_on")
    for place, rank, asynchronous in cases:
        run_dir = tmp_path / f"{place}_{rank}_{asynchronous}"
        failed = [line for line in load_lines(run_dir, "event") if line["event"] == "save_failed"]
        assert [line["step"] for line in failed] == [5 if asynchronous == "true" else 4], run_dir
        assert [line["step"] for line in load_lines(run_dir, "train")] == [1, 2, 3, 4, 5]
        names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        assert names == ["step_00000002", "step_00000005"]
        assert not any(map(find_damage, (run_dir / "checkpoints").iterdir()))


@pytest.mark.slow
def test_with_on_failure_stop_every_rank_gives_the_same_message(toy_data: ToyData, tmp_path: Path) -> None:
    run_with_faults(toy_data, tmp_path, (("writer", 1, "true"),), "checkpoint.on_failure=stop")
    run_dir = tmp_path / "writer_1_true"
    messages = {(run_dir / f"error_rank{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert "earlier checkpoints are untouched" in messages.pop()
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000002"]


def run_with_faults(toy_data: ToyData, root: Path, cases: tuple[tuple[str, int, str], ...], *extra: str) -> None:
    """Train runs of five steps that save every second one and the last; the save of step 4 meets the fault.

    A save in the background is known to have failed only after the last step, whose own save must still follow.
    """
    jobs = []
    for place, rank, asynchronous in cases:
        where = [f"run.root={root}", f"run.name={place}_{rank}_{asynchronous}", "stage=joint", *PP2]
        often = ["checkpoint.every_steps=2", "evaluation.every_steps=0", "data.heldout=null", tokens_of(5)]
        overrides = [*toy_data.overrides(), *where, *often, f"checkpoint.asynchronous={asynchronous}", *extra]
        jobs.append({"overrides": overrides, "place": place, "rank": rank, "step": 4})
    (root / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    run_ranks(2, "tests.helpers.failing_disk", str(root / "jobs.json"))
