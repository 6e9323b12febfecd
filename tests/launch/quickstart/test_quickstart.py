"""The program as a user starts it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.system.errors import UserError
from launch.quickstart.__main__ import compose_drafter, keep_request
from launch.quickstart.folder import QuickstartFolder
from launch.quickstart.processes import decode_command, drafter_command, run_process, train_command


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.quickstart", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_wrong_override_is_one_message_before_anything_runs(tmp_path: Path) -> None:
    result = run_program("--root", str(tmp_path), "train.tokenz=1e5")
    assert result.returncode == 2
    assert "train.tokenz" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "quickstart").exists()


def test_a_wrong_override_of_the_drafter_is_one_message_before_anything_runs(tmp_path: Path) -> None:
    result = run_program("--root", str(tmp_path), "drafter.train.stepz=10")
    assert result.returncode == 2
    assert "draft adapter" in result.stderr
    assert "did you mean 'train.steps'" in result.stderr
    assert not (tmp_path / "quickstart").exists()


def test_the_drafter_is_checked_for_two_processes_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"draft adapter[\s\S]*not divisible"):
        compose_drafter(tmp_path, ["train.global_batch_size=3"])
    assert compose_drafter(tmp_path, []).checkpoint == str(QuickstartFolder(tmp_path).export)


def test_other_overrides_do_not_continue_a_begun_folder(folder: QuickstartFolder) -> None:
    keep_request(folder, ["train.tokens=1e5"])
    keep_request(folder, ["train.tokens=1e5"])
    with pytest.raises(UserError, match="--fresh"):
        keep_request(folder, [])


def test_decoding_without_an_export_is_one_message(tmp_path: Path) -> None:
    command = decode_command(tmp_path / "export", tmp_path / "heldout", tmp_path / "decoding.json")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "export the joint run first" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "decoding.json").exists()


def test_a_failing_command_is_named_with_its_remedy() -> None:
    with pytest.raises(UserError, match=r"the export failed with exit status 3[\s\S]*--fresh"):
        run_process("the export", [sys.executable, "-c", "raise SystemExit(3)"])


def test_training_commands_are_those_of_the_readme() -> None:
    command = train_command("quickstart_ar", Path("runs"), ["train.tokens=1e5"])
    assert command[1:5] == ["-m", "launch.torchrun", "--standalone", "--nproc_per_node=2"]
    assert command[5:] == ["-m", "pretrain.train", "experiment=quickstart_ar", "run.root=runs", "train.tokens=1e5"]
    command = drafter_command(Path("runs"), ["train.steps=10"])
    assert command[1:5] == ["-m", "launch.torchrun", "--standalone", "--nproc_per_node=2"]
    assert command[5:] == ["-m", "lora.train", "experiment=quickstart", "run.root=runs", "train.steps=10"]


@pytest.mark.slow
def test_the_whole_program_runs_and_continues(tmp_path: Path) -> None:
    """Hardly any training: everything is written, linear speculation is exact, the learning checks fail."""
    stages = ("train.tokens=13e3", "evaluation.every_steps=1", "evaluation.sequences=8")
    arguments = ("--root", str(tmp_path), *stages, "drafter.train.steps=2", "drafter.evaluation.sequences=8")
    first = run_program(*arguments)
    assert first.returncode == 1, first.stderr
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    assert summary["modes"]["linear"]["equals_greedy_ar"]
    assert summary["modes"]["linear+adapter"]["equals_greedy_ar"]
    assert summary["drafter"]["steps"] == 2
    assert (tmp_path / "quickstart" / "export" / "linear_spec_lora" / "adapter_config.json").is_file()
    assert summary["stages"]["ar"]["layout"]["tensor_parallel"] == 2
    assert summary["stages"]["joint"]["layout"]["pipeline_parallel"] == 2
    assert summary["stages"]["sft"]["layout"]["data_parallel"] == 2
    assert {answer["mode"] for answer in summary["answers"]} == set(summary["modes"]) - {"linear+adapter"}
    assert all(answer["prompt"] for answer in summary["answers"])
    assert (tmp_path / "quickstart" / "loss_curves.png").stat().st_size > 10_000
    again = run_program(*arguments)
    assert again.returncode == 1
    assert again.stdout.count("done before") == 10


def test_an_interrupt_waits_until_the_command_has_cleaned_up(tmp_path: Path) -> None:
    """torchrun must end its workers, which the terminal's interrupt does not reach."""
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = listen + (
        "import time; from pathlib import Path\n"
        "try:\n    Path('ready').touch(); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(1); Path('cleaned').touch()"
    )
    program = f"{listen}import sys; from launch.quickstart.processes import run_process\n"
    program += f"run_process('it', [sys.executable, '-c', {command!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) != 0
    assert (tmp_path / "cleaned").exists()
