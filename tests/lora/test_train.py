"""The command line of the drafter's training: fast, one message per mistake, nothing loaded too early."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import conf.system.entry
import lora.train
from conf.system.errors import UserError

ROOT = Path(__file__).parents[2]
GIVEN = ["checkpoint=export", "data=chats.jsonl"]


def run_command(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lora.train", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> type:
    """Replace lora.drafter.build, so that the entry can be followed without training."""

    class Trainer:
        raised: BaseException | None = None
        configs: list = []  # noqa: RUF012

        @classmethod
        def run_drafter(cls, config: object) -> None:
            cls.configs.append(config)
            if cls.raised:
                raise cls.raised

    monkeypatch.setitem(sys.modules, "lora.drafter.build", Trainer)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", ["lora.train", *GIVEN])
    monkeypatch.setattr(conf.system.entry, "SECONDS_FOR_RANK_0", 0.0)
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return Trainer


def exit_code() -> object:
    with pytest.raises(SystemExit) as caught:
        lora.train.main()
    return caught.value.code


def test_help_shows_both_ways_to_start_and_what_keys_mean_within_two_seconds() -> None:
    seconds = []
    for _ in range(3):  # the fastest of three: another process may hold the core
        start = time.monotonic()
        shown = run_command("--help").stdout
        seconds.append(time.monotonic() - start)
    assert "python -m lora.train checkpoint=Nemotron-Labs-Diffusion-8B data=" in shown
    assert "torchrun --nproc_per_node=8 -m lora.train" in shown and "zero.stage=3" in shown
    assert "    steps: 2000                             # optimizer steps." in shown
    assert min(seconds) < 2.0


def test_every_example_of_the_usage_composes_and_obeys_the_rules(trainer: type, monkeypatch) -> None:
    text = lora.train.USAGE.partition("examples:")[2].replace("\\\n", " ")
    commands = [line.split("-m lora.train ")[1].split() for line in text.splitlines() if "-m lora.train" in line]
    started = [words for words in commands if "--cfg" not in words]
    for words in started:
        monkeypatch.setattr(sys, "argv", ["lora.train", *words])
        assert exit_code() == 0
    assert len(trainer.configs) == len(started) >= 2


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["checkpont=x"], [*GIVEN, "zero.stage=7"]])
def test_torch_is_not_imported_before_it_is_needed(arguments: list[str]) -> None:
    code = "import sys, atexit; heavy = {'torch', 'transformers', 'peft', 'deepspeed'}; "
    code += f"atexit.register(lambda: print(heavy & set(sys.modules))); sys.argv[1:] = {arguments}; "
    code += "import lora.train; lora.train.main()"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.stdout.splitlines()[-1] == "set()"


def test_cfg_job_prints_the_composed_training() -> None:
    shown = run_command(*GIVEN, "adapter.rank=64", "--cfg", "job").stdout
    assert "checkpoint: export\n" in shown and "  rank: 64\n" in shown and "loss: argmax\n" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpont=x"], "did you mean 'checkpoint'?"),
        ([], "missing required values; give: checkpoint=... data=..."),
        ([*GIVEN, "+x=1"], "unknown key 'x'"),
        ([*GIVEN, "zero.offload_parameters=true"], "zero.stage=3"),
        (["--help", "experiment=none"], "options of experiment"),
    ],
)
def test_a_mistake_is_reported_in_one_line_with_status_2(arguments: list[str], message: str) -> None:
    result = run_command(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1


def test_the_traceback_is_there_for_those_who_ask() -> None:
    assert "Traceback" in run_command(HYDRA_FULL_ERROR="1").stderr


def test_hydra_writes_nothing_and_stays_where_it_is(tmp_path: Path) -> None:
    run_command(*GIVEN, "zero.stage=7", cwd=tmp_path)
    run_command(*GIVEN, "--cfg", "job", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_good_configuration_reaches_the_trainer_as_dataclasses(trainer: type) -> None:
    assert exit_code() == 0
    assert [(config.checkpoint, config.data) for config in trainer.configs] == [("export", "chats.jsonl")]


def test_rules_are_checked_against_the_launched_world_size(trainer: type, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert exit_code() == 2 and trainer.configs == []
    assert "3 ranks" in capsys.readouterr().err


def test_a_user_error_of_the_trainer_is_one_message(trainer: type, capsys) -> None:
    trainer.raised = UserError("export is no checkpoint in the exported format")
    assert exit_code() == 2
    assert capsys.readouterr().err == "error: export is no checkpoint in the exported format\n"


def test_ctrl_c_is_status_130_without_a_traceback(trainer: type, capsys) -> None:
    trainer.raised = KeyboardInterrupt()
    assert exit_code() == 130
    assert capsys.readouterr().err.startswith("interrupted: ")


def test_a_defect_keeps_its_traceback_and_the_environment_is_as_before(trainer: type) -> None:
    trainer.raised = ValueError("shape mismatch")
    with pytest.raises(ValueError, match="shape mismatch"):
        lora.train.main()
    assert "HYDRA_FULL_ERROR" not in os.environ
