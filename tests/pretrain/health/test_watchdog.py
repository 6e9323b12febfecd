"""A process that shows no sign of life ends, and says where it stood."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.health.heartbeat import Watchdog
from tests.helpers.processes import ROOT

SCRIPT = """
import sys, time
from pathlib import Path
from pretrain.health.heartbeat import Watchdog

def wait_for_ever():
    time.sleep(60)

watchdog = Watchdog(Path(sys.argv[1]), rank=3, minutes=1 / 60)
with watchdog.watching():
    for _ in range(4):
        time.sleep(0.5)
        watchdog.alive()
    if "hang" in sys.argv:
        wait_for_ever()
time.sleep(1.2)
print("done")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_stacks_are_written_and_the_process_ends(tmp_path: Path) -> None:
    assert run(str(tmp_path), "hang").returncode == 1
    assert "wait_for_ever" in (tmp_path / "logs" / "stall_rank_3.txt").read_text()


def test_signs_of_life_keep_it_alive_and_no_file_is_left(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert not list((tmp_path / "logs").iterdir())


def test_a_folder_that_is_gone_does_not_hide_why_the_run_ends(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path / "run", rank=0, minutes=1)
    with pytest.raises(OSError, match="the real cause"), watchdog.watching():
        shutil.rmtree(tmp_path / "run")
        raise OSError("the real cause")


def test_stacks_of_an_earlier_start_stay(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "stall_rank_3.txt").write_text("where it stood\n")
    run(str(tmp_path))
    assert (tmp_path / "logs" / "stall_rank_3.txt").read_text() == "where it stood\n"
