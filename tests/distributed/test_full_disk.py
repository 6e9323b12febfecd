"""A full disk while saving: one clear message, the earlier checkpoint intact, nothing half-written, and it resumes."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, load_lines, rank_environment, torchrun, train_many
from tests.helpers.toy_data import ToyData, tokens_of

# One checkpoint of the toy takes 30 MB: the first save fits, the second one does not.
DISK_SIZE = "45m"
MODULES = {"noticed_before": "pretrain.train", "met_while_writing": "tests.helpers.train_without_space_check"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of DISK_SIZE."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("case", MODULES)
def test_a_full_disk_leaves_the_earlier_checkpoint(toy_data: ToyData, small_disk: Path, case: str) -> None:
    where = [f"run.root={small_disk}", "run.name=run", "stage=joint", "checkpoint.every_steps=2"]
    arguments = [*toy_data.overrides(), *where, tokens_of(4), "evaluation.every_steps=0"]
    done = subprocess.run(
        torchrun(2, MODULES[case], *arguments, "parallel=pp2"),
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
