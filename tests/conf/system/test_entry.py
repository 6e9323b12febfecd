"""Entry files end alike: one message on standard error, and a status that says whose turn it is."""

import logging
import subprocess
import sys
import warnings

import pytest

import conf.system.entry
from conf.system.entry import OneLineParser, exit_status, quiet_libraries, read_world_size
from conf.system.errors import ConfigError, UserError


def raising(error: BaseException):
    def action() -> None:
        raise error

    return action


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(conf.system.entry, "SECONDS_FOR_RANK_0", 0.0)


def test_the_number_of_processes_is_a_number_or_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert read_world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "256")
    assert read_world_size() == 256
    for text in ("abc", "0", "-1", "1e3", "", "9" * 20):
        monkeypatch.setenv("WORLD_SIZE", text)
        with pytest.raises(UserError, match=f"WORLD_SIZE={text}, which is no whole number of at least 1: start with"):
            read_world_size()


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_the_status_is_what_the_action_returns(returned: int | None, status: int) -> None:
    assert exit_status(lambda: returned) == status


@pytest.mark.parametrize("kind", [UserError, ConfigError])
@pytest.mark.parametrize(("rank", "prefix"), [(None, "error: "), ("0", "error: "), ("5", "error on rank 5: ")])
def test_a_user_error_is_one_message_and_status_2(
    kind: type[UserError], rank: str | None, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert exit_status(raising(kind("[bold]DIR[/bold] is empty"))) == 2
    assert capsys.readouterr() == ("", f"{prefix}[bold]DIR[/bold] is empty\n")


def test_the_traceback_comes_before_the_message_on_request(capsys) -> None:
    assert exit_status(raising(UserError("DIR is empty")), show_traceback=True) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith("\nerror: DIR is empty\n")


@pytest.mark.parametrize(("rank", "said"), [("0", "interrupted: again\n"), ("1", "")])
def test_ctrl_c_is_status_130_and_said_once(rank: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("RANK", rank)
    assert exit_status(raising(KeyboardInterrupt()), interrupted="interrupted: again") == 130
    assert capsys.readouterr() == ("", said)
    assert exit_status(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("defect", [ValueError("shapes"), OSError("disk"), KeyError("layer")])
def test_a_defect_passes_through(defect: Exception) -> None:
    with pytest.raises(type(defect)):
        exit_status(raising(defect))


def test_a_mistake_on_the_command_line_is_one_message_too(capsys) -> None:
    parser = OneLineParser(prog="command")
    parser.add_argument("--count", type=int)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--count", "many"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "error: argument --count: invalid int value: 'many' (--help shows the options)\n"
    )


def warn_from(module: str) -> None:
    exec("import warnings; warnings.warn('noise', stacklevel=1)", {"__name__": module})


@pytest.mark.parametrize(("module", "shown"), [("megatron.core", 0), ("deepspeed", 0), ("deepspeeder", 1), ("ours", 1)])
def test_only_the_named_libraries_are_quieted(module: str, shown: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_libraries("deepspeed")
        warn_from(module)
    assert len(caught) == shown
    assert logging.getLogger("deepspeed").level == logging.ERROR


def test_whoever_asks_python_for_warnings_sees_them() -> None:
    code = "from conf.system.entry import quiet_libraries; quiet_libraries(); import warnings"
    code += "; print(len(warnings.filters))"
    lines = [
        subprocess.run([sys.executable, "-W", "default", "-c", text], capture_output=True, text=True, check=True).stdout
        for text in (code, code.replace("quiet_libraries();", ""))
    ]
    assert lines[0] == lines[1]


def test_the_helper_needs_only_the_standard_library() -> None:
    code = "import sys, conf.system.entry; print({'hydra', 'omegaconf', 'rich', 'torch'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "set()\n"
