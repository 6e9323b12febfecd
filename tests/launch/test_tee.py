"""The copy of the console has whole lines without progress bars, and never disturbs the original."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT


def run_teed(log: Path, code: str) -> subprocess.CompletedProcess[bytes]:
    program = f"import os, subprocess, sys\nfrom pathlib import Path\nfrom launch.tee import tee_output\n{code}\n"
    return subprocess.run([sys.executable, "-c", program, str(log)], cwd=ROOT, capture_output=True, timeout=60)


def test_both_streams_are_copied_and_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("before\n")
    speak = "subprocess.run(['bash', '-c', 'echo out; sleep 0.2; echo err >&2; sleep 0.2; printf end'])"
    result = run_teed(tmp_path / "log", f"with tee_output(Path(sys.argv[1])): {speak}\nprint('after')")
    assert (result.stdout, result.stderr) == (b"out\nendafter\n", b"err\n")
    assert (tmp_path / "log").read_text() == "before\nout\nerr\nend\n"


@pytest.mark.parametrize(
    ("printed", "logged"),
    [
        (r"\r\x1b[2Kbar 1 %\r\x1b[2Kbar 2 %\r\x1b[2Kstep 10: loss 3\nbar 3 %", "step 10: loss 3\nbar 3 %\n"),
        (r"\x1b[1;31merror\x1b[0m: bad\r\n\n", "error: bad\n\n"),
        (r"\x1b[?25l\n", ""),
    ],
)
def test_of_a_progress_bar_the_log_keeps_what_a_line_shows_in_the_end(
    tmp_path: Path, printed: str, logged: str
) -> None:
    run_teed(tmp_path / "log", f"with tee_output(Path(sys.argv[1])): os.write(1, b'{printed}')")
    assert (tmp_path / "log").read_bytes().decode() == logged


def test_a_console_that_went_away_does_not_end_what_prints(tmp_path: Path) -> None:
    code = "with tee_output(Path(sys.argv[1])):\n  for i in range(3): os.write(1, b'line\\n')"
    program = f"import os, sys\nfrom pathlib import Path\nfrom launch.tee import tee_output\n{code}\n"
    command = [sys.executable, "-c", program, str(tmp_path / "log")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(60) == 0
    assert (tmp_path / "log").read_text() == "line\n" * 3
