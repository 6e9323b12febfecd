"""Every start leaves a record from which it can be explained and repeated."""

import json
import subprocess
from pathlib import Path

import yaml

from conf.schema import GuardConfig
from pretrain.run import start_record
from pretrain.run.start_record import record_start


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout


def test_starts_are_numbered_and_hold_configuration_environment_code_and_changes(tmp_path, monkeypatch) -> None:
    code = tmp_path / "code"
    code.mkdir()
    git(code, "init", "-q")
    (code / "file.py").write_text("a = 1\n")
    git(code, "add", ".")
    git(code, "commit", "-qm", "first")
    monkeypatch.setattr(start_record, "_CODE", code)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("SLURM_JWT", "secret")
    first = record_start(GuardConfig(window=7), tmp_path / "run", 2, [])
    (code / "file.py").write_text("a = 2\n")
    second = record_start(GuardConfig(window=7), tmp_path / "run", 2, ["train.tokens: 1 then, 2 now"])
    assert [first.name, second.name] == ["000", "001"]
    assert yaml.safe_load((second / "config.yaml").read_text())["window"] == 7
    environment = json.loads((second / "environment.json").read_text())
    assert environment["variables"]["SLURM_JOB_ID"] == "7"
    assert environment["world_size"] == 2
    assert "secret" not in (second / "environment.json").read_text()
    commit = git(code, "rev-parse", "HEAD").strip()
    records = [json.loads((start / "code.json").read_text()) for start in (first, second)]
    assert records == [{"commit": commit, "dirty": False}, {"commit": commit, "dirty": True}]
    assert "+a = 2" in (second / "code.diff").read_text()
    assert (second / "changes.txt").read_text() == "train.tokens: 1 then, 2 now\n"


def test_code_that_lies_in_no_repository_is_said_to_be_unknown(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(start_record, "_CODE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    start = record_start(GuardConfig(), tmp_path / "run", 1, [])
    assert json.loads((start / "code.json").read_text()) == {"commit": None, "dirty": False}
