"""launch/stages.sh with an sbatch made of a script: which jobs, in which order, with which overrides."""

import shlex
from pathlib import Path

import pytest

from tests.helpers.fake_slurm import FakeSlurm
from tests.helpers.processes import ROOT


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    (tmp_path / "fake").mkdir()
    return FakeSlurm(tmp_path / "fake")


def test_every_stage_waits_for_the_one_before(slurm: FakeSlurm, tmp_path: Path) -> None:
    export = f"{tmp_path}/instruct"
    result = slurm.run(
        *("launch/stages.sh", "quickstart", "train.tokens=1e4", "sft.train.tokens=2e4", "joint.stage.block_size=32"),
        *("drafter.train.steps=3", f"run.root={tmp_path}"),
        STAGE_OPTIONS="--nodes=1 --ntasks-per-node=2",
        EXPORT=export,
    )
    assert result.stdout.splitlines() == ["ar 1", "joint 2", "sft 3", "export 4", "drafter 5"], result.stderr
    jobs = slurm.calls("sbatch")
    assert [f"--dependency=afterok:{number} --kill-on-invalid-dep=yes" in jobs[number] for number in range(1, 5)]
    assert "afterok" not in jobs[0]
    everywhere = f"train.tokens=1e4 {{}}run.root={tmp_path}"
    script = f"{ROOT}/launch/slurm.sbatch"
    options = "--nodes=1 --ntasks-per-node=2"
    assert jobs[0].endswith(f"{options} {script} experiment=quickstart_ar {everywhere.format('')}")
    assert jobs[1].endswith(f"experiment=quickstart_joint {everywhere.format('stage.block_size=32 ')}")
    assert jobs[2].endswith(f"experiment=quickstart_sft {everywhere.format('train.tokens=2e4 ')}")
    assert "MODULE=model.convert" in jobs[3] and f"--from {tmp_path}/quickstart/sft --to {export}" in jobs[3]
    assert "MODULE=lora.train" in jobs[4]
    assert jobs[4].endswith(f"{script} experiment=quickstart checkpoint={export} train.steps=3")


def test_a_dry_run_prints_the_commands_and_submits_nothing(slurm: FakeSlurm) -> None:
    words = ["data.tokenizer=checkpoints/base", "data.train=corpus/train", "ar.init_from=checkpoints/base"]
    result = slurm.run("launch/stages.sh", "--dry-run", "8b", *words, "drafter.data=my prompts.jsonl")
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    experiments = [word for command in commands for word in command if word.startswith("experiment=")]
    assert experiments == ["experiment=nld_8b_ar", "experiment=nld_8b_joint", "experiment=nld_8b_sft"]
    assert commands[0][-1] == "init_from=checkpoints/base"
    assert commands[4][-3:] == ["run.name=nld_8b_drafter", "checkpoint=exports/nld_8b", "data=my prompts.jsonl"]
    assert slurm.calls("sbatch") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a size"),
        (["9b"], "did you mean experiment=nld_8b_ar"),
        (["--run", "8b"], "unknown option --run"),
        (["quickstart", "joint.train.token=1"], "about stage joint"),
        (["quickstart", "drafter.train.step=1"], "about stage drafter"),
    ],
)
def test_mistakes_are_reported_before_anything_is_submitted(slurm: FakeSlurm, words: list[str], message: str) -> None:
    result = slurm.run("launch/stages.sh", *words)
    assert result.returncode == 2 and message in result.stderr
    assert slurm.calls("sbatch") == []


def test_an_existing_export_is_left_as_it_is(slurm: FakeSlurm, tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    result = slurm.run("launch/stages.sh", "quickstart", EXPORT=str(tmp_path))
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["ar", "joint", "sft", "drafter"]
    assert "is left unchanged" in result.stderr
    assert "afterok:3" in slurm.calls("sbatch")[3]


def test_help_is_the_scripts_own_introduction(slurm: FakeSlurm) -> None:
    result = slurm.run("launch/stages.sh", "--help")
    assert result.returncode == 0 and "launch/stages.sh SIZE [overrides]" in result.stdout
    assert "STAGE_OPTIONS" in result.stdout and "set -e" not in result.stdout
