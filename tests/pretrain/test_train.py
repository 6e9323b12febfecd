"""The command line of the trainer: fast answers, one message per mistake, nothing written by Hydra."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import conf.system.entry
import pretrain.train
from conf.composition.trees import RUN_TREE
from conf.system.errors import UserError
from tests.helpers.layouts import TP8

ROOT = Path(__file__).parents[2]
GIVEN = ["data.train=corpus/train", "data.tokenizer=corpus/tokenizer", "train.tokens=1e6"]


def run_command(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pretrain.train", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def imported_trainer(monkeypatch: pytest.MonkeyPatch) -> type:
    """Replace pretrain.assemble, so that the entry can be followed without training."""

    class Trainer:
        raised: Exception | None = None
        configs: list = []  # noqa: RUF012

        @classmethod
        def run_training(cls, config: object) -> None:
            cls.configs.append(config)
            if cls.raised:
                raise cls.raised

    Trainer.configs = []
    monkeypatch.setitem(sys.modules, "pretrain.assemble", Trainer)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", ["pretrain.train", *GIVEN])
    monkeypatch.setattr(conf.system.entry, "SECONDS_FOR_RANK_0", 0.0)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return Trainer


def test_help_shows_every_group_every_option_and_the_usage() -> None:
    shown = run_command("--help").stdout
    for group in RUN_TREE.groups:
        assert f"\n  {group}\n" in shown
        assert all(f"\n    {option} " in shown for option in RUN_TREE.options(group))
    assert "torchrun" in shown and "init_from" in shown and "global_batch_size" in shown


def test_cfg_job_prints_the_composed_run() -> None:
    shown = run_command("experiment=nld_8b_joint", "schedule.peak_lr=3e-6", "--cfg", "job").stdout
    assert "name: ministral3_8b" in shown and "peak_lr: 3.0e-06" in shown and "tokens: 300000000000.0" in shown


@pytest.mark.parametrize("arguments", [["--help"], ["experiment=nld_8b_joint", "--cfg", "job"]])
def test_help_and_cfg_print_within_two_seconds(arguments: list[str]) -> None:
    seconds = []
    for _ in range(3):  # the fastest of three: another process may hold the core
        start = time.monotonic()
        assert run_command(*arguments).returncode == 0
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 2.0


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["train.tokns=1"], [*GIVEN, *TP8]])
def test_torch_is_not_imported_before_it_is_needed(arguments: list[str]) -> None:
    code = f"import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); sys.argv[1:] = {arguments}; "
    code += "import pretrain.train; pretrain.train.main()"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.tokns=1"], "did you mean 'train.tokens'?"),
        (["model=ministral_8b"], "did you mean model=ministral3_8b?"),
        (["+x=1", *GIVEN], "unknown key 'x'"),
        (["model=3"], "must be a string"),
        ([], "missing required values; give: data.train=... data.tokenizer=... train.tokens=..."),
        ([*GIVEN, *TP8], "parallel.tensor_parallel=8"),
        (["--help", "model=none"], "options of model"),
    ],
)
def test_a_mistake_is_one_message_with_status_2(arguments: list[str], message: str) -> None:
    result = run_command(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert "Traceback" not in result.stderr and "Hydra" not in result.stderr


def test_the_traceback_is_there_for_those_who_ask() -> None:
    assert "Traceback" in run_command(HYDRA_FULL_ERROR="1").stderr


def test_hydra_writes_nothing_and_stays_where_it_is(tmp_path: Path) -> None:
    run_command(*GIVEN, *TP8, cwd=tmp_path)
    run_command(*GIVEN, "--cfg", "job", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_good_configuration_reaches_the_trainer_as_dataclasses(imported_trainer: type) -> None:
    with pytest.raises(SystemExit) as caught:
        pretrain.train.main()
    assert caught.value.code == 0
    assert [config.train.tokens for config in imported_trainer.configs] == [1e6]


def test_rules_are_checked_against_the_launched_world_size(
    imported_trainer: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit) as caught:
        pretrain.train.main()
    assert caught.value.code == 2 and imported_trainer.configs == []
    assert "3 data-parallel ranks" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "prefix"), [("0", "error: "), ("5", "error on rank 5: ")])
def test_a_user_error_of_the_trainer_is_one_message(
    imported_trainer: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, prefix: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    imported_trainer.raised = UserError("the dataset corpus/train is empty; prepare it again")
    with pytest.raises(SystemExit) as caught:
        pretrain.train.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"{prefix}the dataset corpus/train is empty; prepare it again\n"


@pytest.mark.parametrize("defect", [ValueError("shape mismatch"), KeyError("decoder")])
def test_a_defect_keeps_its_traceback(imported_trainer: type, defect: Exception) -> None:
    imported_trainer.raised = defect
    with pytest.raises((ValueError, KeyError, SystemExit)) as caught:
        pretrain.train.main()
    assert not isinstance(caught.value, SystemExit) or caught.value.code == 1
