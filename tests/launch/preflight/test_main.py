"""The command has a status, a table, JSON and messages."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from conf.composition.compose import compose_run_config
from conf.system.errors import UserError
from launch.preflight import __main__ as command
from launch.preflight.__main__ import CHECKS
from launch.preflight.runner import Finding, PreflightCheck

OVERRIDES = ["stage=ar", "model=tiny", "runtime=cpu", "data.train=t", "data.tokenizer=t", "train.tokens=1e6"]


def run(monkeypatch: pytest.MonkeyPatch, root: Path, *checks: PreflightCheck, as_json: bool = False) -> None:
    monkeypatch.setattr(command, "CHECKS", checks)
    config = compose_run_config([*OVERRIDES, "schedule.peak_lr=1e-3", "schedule.final_lr=0", f"run.root={root}"])
    options = Namespace(nodes=2, gpus_per_node=None, no_dry_batch=True, json=as_json)
    command.run_preflight(config, options)


GOOD = PreflightCheck("good", lambda job: iter([Finding.ok("all is well"), Finding.warning("mind this")]))
BAD = PreflightCheck("bad", lambda job: iter([Finding.failed("do that")]))
LATER = PreflightCheck("later", lambda job: iter([Finding.ok("fine")]), needs=("bad",))


def test_warnings_do_not_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    run(monkeypatch, tmp_path, GOOD)
    output = capsys.readouterr()
    assert "all is well" in output.out and "mind this" in output.out and "2 nodes x 1" in output.out
    assert "good" in output.err  # while they run


def test_failures_are_counted_and_what_needs_them_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    with pytest.raises(UserError, match="1 of 4 findings"):
        run(monkeypatch, tmp_path, GOOD, BAD, LATER, as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert [row["result"] for row in report["checks"]] == ["ok", "warning", "failed", "warning"]
    assert "needs what failed above (bad)" in report["checks"][-1]["detail"]
    assert report["world_size"] == 2 and report["counts"] == {"ok": 1, "warning": 2, "failed": 1}


def test_needs_are_names_of_earlier_checks() -> None:
    names = [check.name for check in (*CHECKS, command.DRY_BATCH)]
    for position, check in enumerate((*CHECKS, command.DRY_BATCH)):
        assert set(check.needs) <= set(names[:position])


@pytest.mark.parametrize(
    ("words", "named"),
    [(["train.token=1"], "train.tokens"), (["--nodes", "0"], "at least 1"), (["--nodse", "2"], "--nodse")],
)
def test_a_wrong_command_line_is_answered_at_once_with_status_2(words: list[str], named: str) -> None:
    done = subprocess.run([sys.executable, "-m", "launch.preflight", *words], capture_output=True, text=True)
    assert done.returncode == 2 and named in done.stderr and not done.stdout
