"""The command is quick, imports no torch, prints one message for a mistake, and tables that fit a terminal."""

import json
import subprocess
import sys
import time

import pytest

from launch.plan.__main__ import build_parser, run_plan
from tests.helpers.layouts import TP1, TP4_SP_PP2

RECIPES = [f"nld_{size}_{stage}" for size in ("3b", "8b", "14b") for stage in ("ar", "joint", "sft")]
SECONDS = 1.5


def run(*arguments: str) -> int:
    return run_plan(build_parser().parse_intermixed_args(arguments))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.plan", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_its_256_gpus(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"experiment={recipe}", "--gpus", "256") == 0
    shown = capsys.readouterr().out
    assert recipe in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_a_search_shows_its_best_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("experiment=nld_14b_joint", "--gpus", "256", "--search", "--top", "3") == 0
    shown = capsys.readouterr().out
    assert "train.micro_batch_size=" in shown
    tables = [line for line in shown.splitlines() if not line.startswith("Fastest")]
    assert max(map(len, tables)) <= 100


def test_json_holds_what_the_tables_show(capsys: pytest.CaptureFixture[str]) -> None:
    run("experiment=nld_8b_joint", *TP4_SP_PP2, "train.micro_batch_size=2", "--gpus", "256", "--json")
    plan = json.loads(capsys.readouterr().out)
    assert plan["layout"] == "TP4 PP2 DP32 SP"
    assert len(plan["memory"]) == 2
    assert plan["memory_bytes"] == max(stage["total"] for stage in plan["memory"])
    assert plan["step_seconds"] == pytest.approx(sum(plan["seconds"].values()))
    assert {item["group"] for item in plan["communication"]} == {"tensor", "pipeline", "data"}


def test_what_does_not_fit_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("experiment=nld_8b_joint", *TP1, "--gpus", "256") == 1
    assert "does not fit" in capsys.readouterr().out
    assert run("experiment=nld_8b_joint", "--gpus", "8", "--gpu-memory-gb", "20", "--search", "--json") == 1
    assert json.loads(capsys.readouterr().out)["nearest"]["memory_bytes"] > 12e9


def test_the_command_is_quick_and_imports_no_torch() -> None:
    started = time.monotonic()
    watch = "import sys, launch.plan.__main__; assert not {'torch', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", watch], check=True)
    assert time.monotonic() - started < 10 * SECONDS  # ten times what it takes on a free machine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("experiment=nld_8b_ar", "--gpus", "250"), "250 ranks are not a multiple"),
        (("experiment=nld_8b_arr", "--gpus", "256"), "nld_8b_ar"),
        (("experiment=nld_8b_ar",), "--gpus"),
        (("experiment=nld_8b_ar", "--gpus", "256", "--mfu", "40"), "mfu"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(arguments: tuple[str, ...], message: str) -> None:
    result = command(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
