"""launch/rank.sh: variables of srun or torchrun become those of torch.distributed; output and exit status."""

import signal
import subprocess
from pathlib import Path

import pytest

from tests.helpers.fake_slurm import FakeSlurm

SLURM = {
    "SLURM_JOB_ID": "40001",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NODELIST": "node[7-8]",
}
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PRINT = f"import os; print(*[os.environ[name] for name in {NAMES}])"


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    (tmp_path / "fake").mkdir()
    return FakeSlurm(tmp_path / "fake")


def start_rank(slurm: FakeSlurm, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of Python as a module, by way of `timeit -n 1 -r 1 CODE`; timeit's own report is cut off."""
    return slurm.run("launch/rank.sh", "timeit", "-n1", "-r1", *words, **environment)


def test_slurms_variables_become_torchs(slurm: FakeSlurm) -> None:
    result = start_rank(slurm, PRINT, **SLURM)
    assert result.stdout.splitlines()[0] == f"9 1 16 node7 {15000 + 40001 % 15000}"
    result = start_rank(slurm, PRINT, **SLURM, MASTER_ADDR="host", MASTER_PORT="7")
    assert result.stdout.splitlines()[0] == "9 1 16 host 7"


def test_what_torchrun_says_counts_inside_a_slurm_job_too(slurm: FakeSlurm) -> None:
    torchrun = dict(zip(NAMES, ("1", "0", "2", "localhost", "5"), strict=True)) | {"TORCHELASTIC_RUN_ID": "x"}
    assert start_rank(slurm, PRINT, **SLURM, **torchrun).stdout.splitlines()[0] == "1 0 2 localhost 5"


def test_missing_variables_are_named(slurm: FakeSlurm) -> None:
    present = {name: value for name, value in SLURM.items() if name not in ("SLURM_PROCID", "SLURM_NTASKS")}
    result = start_rank(slurm, PRINT, **present)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: SLURM_PROCID SLURM_NTASKS not set: this rank was started neither by srun")
    assert "launch/local.sh" in result.stderr and len(result.stderr.splitlines()) == 1


def test_an_interpreter_that_is_not_there_is_an_error(slurm: FakeSlurm) -> None:
    result = start_rank(slurm, PRINT, **SLURM, PYTHON="/nowhere/python")
    assert result.returncode == 2 and "no interpreter /nowhere/python" in result.stderr
    assert slurm.run("launch/rank.sh", **SLURM).returncode == 2


def test_output_goes_to_the_ranks_log_except_rank_0s(slurm: FakeSlurm, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    for rank in ("0", "9", "9"):
        result = start_rank(slurm, "print('hello')", **SLURM | {"SLURM_PROCID": rank}, LOG_DIR=str(logs))
        assert ("hello" in result.stdout) == (rank == "0")
    lines = (logs / "rank_9.log").read_text().splitlines()
    assert lines.count("hello") == 2
    assert sum(line.startswith("== ") and "rank 9 of 16" in line and "job 40001" in line for line in lines) == 2
    assert not (logs / "rank_0.log").exists()


def test_the_ranks_end_is_its_own(slurm: FakeSlurm) -> None:
    assert start_rank(slurm, "import os; os._exit(75)", **SLURM).returncode == 75
    killed = start_rank(slurm, "import os; os.kill(os.getpid(), 10)", **SLURM)
    assert killed.returncode == -signal.SIGUSR1
