"""launch/local.sh and launch/run_dir.py: mistakes before a rank starts, logs in the run folder."""

import sys
from pathlib import Path

import pytest

from tests.helpers.fake_slurm import FakeSlurm
from tests.helpers.processes import ROOT


@pytest.fixture
def shell(tmp_path: Path) -> FakeSlurm:
    (tmp_path / "fake").mkdir()
    return FakeSlurm(tmp_path / "fake")


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["experiment=quickstart_ra"], {}, "did you mean experiment=quickstart_ar"),
        (["experiment=quickstart_ar"], {"NPROC_PER_NODE": "3"}, "3 ranks are not a multiple of"),
        (["experiment=quickstart_ar"], {"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE=two is not a number of ranks"),
        (["experiment=quickstart_ar"], {"NNODES": "2"}, "RDZV_ENDPOINT"),
        (["experiment=quickstart"], {"MODULE": "lora.trian"}, "lora.train"),
        (["experiment=quickstart_ar", "run.root=/proc/no"], {"NPROC_PER_NODE": "2"}, "logs cannot be written"),
    ],
)
def test_mistakes_are_reported_before_a_rank_starts(
    shell: FakeSlurm, words: list[str], environment: dict[str, str], message: str
) -> None:
    result = shell.run("launch/local.sh", *words, **environment)
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr and "Traceback" not in result.stderr


def test_help_and_the_composed_configuration_start_no_rank(shell: FakeSlurm) -> None:
    result = shell.run("launch/local.sh", "--help")
    assert result.returncode == 0 and "NNODES=2 RDZV_ENDPOINT=node1:29500" in result.stdout
    result = shell.run("launch/local.sh", "experiment=quickstart_ar", "--cfg", "job")
    assert result.returncode == 0 and "experiment: quickstart_ar" in result.stdout


def test_paths_are_relative_to_where_the_user_is(shell: FakeSlurm, tmp_path: Path) -> None:
    """Put a script in place of the interpreter: it prints its arguments."""
    recorder = tmp_path / "python"
    recorder.write_text(f'#!/bin/sh\n[ "$2" = launch.run_dir ] && exec {sys.executable} "$@"\necho "$LOG_DIR: $*"\n')
    recorder.chmod(0o755)
    command = f"cd {tmp_path} && {ROOT}/launch/local.sh experiment=quickstart_ar 'run.root=my runs'"
    result = shell.run("bash", "-c", command, PYTHON=str(recorder), NPROC_PER_NODE="2")
    assert result.stdout.startswith("my runs/quickstart/ar/logs: -m launch.torchrun --nnodes=1 --nproc-per-node=2")
    assert result.stdout.endswith("-m pretrain.train experiment=quickstart_ar run.root=my runs\n")
    assert (tmp_path / "my runs" / "quickstart" / "ar" / "logs").is_dir()


def test_the_run_folder_is_printed_for_both_trainings(shell: FakeSlurm) -> None:
    ask = (sys.executable, "-m", "launch.run_dir")
    assert shell.run(*ask, "pretrain.train", "experiment=quickstart_ar", "run.name=a/b").stdout == "runs/a/b\n"
    assert shell.run(*ask, "lora.train", "experiment=quickstart", "run.dir=/x").stdout == "/x\n"
    result = shell.run(*ask, "pretrain.train", "experiment=quickstart_ar", WORLD_SIZE="5")
    assert (result.returncode, result.stdout) == (2, "")
