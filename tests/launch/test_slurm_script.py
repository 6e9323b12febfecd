"""launch/slurm.sbatch with a Slurm made of scripts: what starts, and what follows when the ranks have exited.

With a real Slurm: tests/launch/slurm/.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.fake_slurm import FakeSlurm
from tests.helpers.processes import ROOT

SCRIPTS = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")]
JOB = {
    "SLURM_JOB_ID": "5",
    "SLURM_NTASKS": "2",
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_CPUS_PER_TASK": "3",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "JOB_STATE": "RUNNING",
}


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    (tmp_path / "fake").mkdir()
    return FakeSlurm(tmp_path / "fake")


def run_job(
    slurm: FakeSlurm, tmp_path: Path, ranks: str, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the batch script; without words, with a module that has no run folder and logs to tmp_path/run."""
    variables = JOB | {"RANKS": ranks} | environment
    if not words:
        variables |= {"MODULE": "some.module", "LOG_DIR": str(tmp_path / "run")}
    return slurm.run("bash", "launch/slurm.sbatch", *words, **variables)


def was_requeued(slurm: FakeSlurm) -> bool:
    return "requeue 5" in slurm.calls("scontrol")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_bash(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], timeout=30).returncode == 0


@pytest.mark.parametrize(
    ("ranks", "status", "requeued", "said"),
    [
        ("exit 0", 0, False, "complete"),
        ("exit 75", 75, True, ": requeued\n"),
        ("exit 138", 138, True, ": requeued\n"),  # SIGUSR1 before it was handled
        ("exit 2", 2, False, "says what to fix"),
        ("exit 130", 130, False, "interrupted"),
        ("save step_00000020; exit 1", 1, True, "crashed with status 1"),
        ("exit 1", 1, False, "no checkpoint was completed since the start at step 10"),
        ("save step_00000020.partial; exit 137", 137, False, "crashed with status 137"),
    ],
)
def test_what_follows_on_the_ranks_status(
    slurm: FakeSlurm, tmp_path: Path, ranks: str, status: int, requeued: bool, said: str
) -> None:
    (tmp_path / "run" / "checkpoints" / "step_00000010").mkdir(parents=True)
    result = run_job(slurm, tmp_path, ranks)
    assert (result.returncode, was_requeued(slurm)) == (status, requeued), result.stderr
    assert said in result.stdout


def test_a_job_that_was_cancelled_is_not_revived(slurm: FakeSlurm, tmp_path: Path) -> None:
    result = run_job(slurm, tmp_path, "exit 75", JOB_STATE="COMPLETING")
    assert (result.returncode, was_requeued(slurm)) == (75, False)
    assert "not requeued" in result.stdout


def test_rank_0s_output_is_shown_and_logged(slurm: FakeSlurm, tmp_path: Path) -> None:
    result = run_job(slurm, tmp_path, "echo hello; echo trouble >&2; exit 0")
    assert "hello\ntrouble\n" in result.stdout
    log = (tmp_path / "run" / "rank_0.log").read_text()
    assert re.match(r"== .* job 5, start 1: 2 tasks on node\[7-8\]: some.module", log)
    assert "hello\ntrouble\n" in log


def test_the_ranks_are_started_with_the_module_and_its_words(slurm: FakeSlurm, tmp_path: Path) -> None:
    words = ("experiment=quickstart_joint", f"run.root={tmp_path}/a b")
    ranks = 'echo "meet at $MASTER_ADDR"; printf "<%s>" "$@"; exit 0'
    result = run_job(slurm, tmp_path, ranks, *words, CONTAINER_IMAGE="image.sqsh", PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    assert "meet at node7" in result.stdout
    assert "--cpus-per-task=3" in result.stdout and "<--container-image=image.sqsh>" in result.stdout
    tail = f"<{ROOT}/launch/rank.sh><pretrain.train>" + "".join(f"<{word}>" for word in words)
    assert tail in result.stdout
    assert (tmp_path / "a b" / "quickstart" / "joint" / "logs" / "rank_0.log").exists()


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["experiment=quickstart_jiont"], {}, "did you mean experiment=quickstart_joint"),
        (["experiment=quickstart_joint"], {"SLURM_NTASKS": "3"}, "3 ranks are not a multiple of"),
        (["experiment=quickstart_joint"], {"SLURM_JOB_ID": ""}, "not in a Slurm job"),
        (["experiment=quickstart_joint"], {"SLURM_SUBMIT_DIR": "/tmp"}, "/tmp is not the repository"),
        (["--from", "a"], {"MODULE": "model.convert"}, "MODULE=model.convert has no run folder: give LOG_DIR"),
        (["--sweep", "sweep.txt"], {}, "--sweep is for arrays"),
        (["--sweep", "/nowhere"], {"SLURM_ARRAY_TASK_ID": "1"}, "no such file"),
    ],
)
def test_mistakes_are_one_message_before_any_rank_starts(
    slurm: FakeSlurm, tmp_path: Path, words: list[str], environment: dict[str, str], message: str
) -> None:
    result = run_job(slurm, tmp_path, "exit 0", *words, **environment)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert slurm.calls("srun") == []


def test_a_task_of_an_array_takes_its_line(slurm: FakeSlurm, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("run.name=a schedule.peak_lr=1\nrun.name=b 'model.name=a b'\nschedule.peak_lr=3\n")
    words = ("--sweep", str(sweep), "experiment=quickstart_joint", f"run.root={tmp_path}")
    ranks = 'printf "<%s>" "${@:6}"; exit 0'
    result = run_job(slurm, tmp_path, ranks, *words, SLURM_ARRAY_TASK_ID="1")
    assert f"<experiment=quickstart_joint><run.root={tmp_path}><run.name=b><model.name=a b>" in result.stdout
    assert (tmp_path / "b" / "logs").is_dir()
    result = run_job(slurm, tmp_path, ranks, *words, SLURM_ARRAY_TASK_ID="2")
    assert result.returncode == 2 and "line 3 (task 2) gives no run.name=" in result.stderr
