"""The quickstart runs, continues and reports mistakes as a user sees it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.schema import RunConfig
from conf.system.errors import UserError
from launch.quickstart.folder import QuickstartFolder
from launch.quickstart.phases import module_command, run_process
from launch.quickstart.story import Overrides, build_phases, compose_drafter, record_request, split_overrides


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
    record_request(folder, ["train.tokens=1e5"])
    record_request(folder, ["train.tokens=1e5"])
    with pytest.raises(UserError, match="--fresh"):
        record_request(folder, [])


def test_decoding_without_an_export_is_one_message(tmp_path: Path) -> None:
    paths = [f"--{name}={tmp_path / name}" for name in ("export", "heldout")]
    command = module_command("launch.quickstart.decode", *paths, f"--output={tmp_path / 'decoding.json'}")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "export the joint run first" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "decoding.json").exists()


def test_a_failing_command_is_named_with_its_remedy() -> None:
    with pytest.raises(UserError, match=r"the export failed with exit status 3[\s\S]*--fresh"):
        run_process("the export", [sys.executable, "-c", "raise SystemExit(3)"])


def test_overrides_reach_the_command_they_are_for() -> None:
    split = split_overrides(["train.tokens=1e5", "drafter.train.steps=10", "drafter.adapter.rank=8"])
    assert split.stages == ["train.tokens=1e5"]
    assert split.drafter == ["train.steps=10", "adapter.rank=8"]


def test_training_commands_are_those_of_the_readme(configs: dict[str, RunConfig]) -> None:
    phases = build_phases(QuickstartFolder(Path("runs")), configs, Overrides(["train.tokens=1e5"], ["train.steps=10"]))
    commands = {phase.name: phase.work for phase in phases if isinstance(phase.work, list)}
    assert [phase.name for phase in phases if phase.resumes] == ["ar", "joint", "drafter", "sft"]
    for stage in ("ar", "joint", "sft"):
        command = commands[stage]
        assert command[1:5] == ["-m", "launch.torchrun", "--standalone", "--nproc_per_node=2"]
        assert command[5:7] == ["-m", "pretrain.train"]
        assert command[7:] == [f"experiment=quickstart_{stage}", "run.root=runs", "train.tokens=1e5"]
    command = commands["drafter"]
    assert command[1:5] == ["-m", "launch.torchrun", "--standalone", "--nproc_per_node=2"]
    assert command[5:] == ["-m", "lora.train", "experiment=quickstart", "run.root=runs", "train.steps=10"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_program_runs_and_continues(tmp_path: Path) -> None:
    """With hardly any training everything is written and speculation is exact, but the learning checks fail."""
    stages = ("train.tokens=13e3", "evaluation.every_steps=1", "evaluation.sequences=8")
    arguments = ("--root", str(tmp_path), *stages, "drafter.train.steps=2", "drafter.evaluation.sequences=8")
    first = run_program(*arguments)
    assert first.returncode == 1, first.stderr
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    assert summary["modes"]["linear"]["equals_greedy_ar"]
    assert summary["modes"]["quadratic"]["equals_greedy_ar"]
    assert summary["modes"]["linear+adapter"]["equals_greedy_ar"]
    assert summary["drafter"]["steps"] == 2
    assert (tmp_path / "quickstart" / "export" / "linear_spec_lora" / "adapter_config.json").is_file()
    assert summary["stages"]["ar"]["layout"]["tensor_parallel"] == 2
    assert summary["stages"]["joint"]["layout"]["pipeline_parallel"] == 2
    assert summary["stages"]["sft"]["layout"]["data_parallel"] == 2
    assert {response["mode"] for response in summary["responses"]} == set(summary["modes"]) - {"linear+adapter"}
    assert all(response["prompt"] for response in summary["responses"])
    assert (tmp_path / "quickstart" / "loss_curves.png").stat().st_size > 10_000
    again = run_program(*arguments)
    assert again.returncode == 1
    assert again.stdout.count("done before") == 10


def test_an_interrupt_waits_until_the_command_has_cleaned_up(tmp_path: Path) -> None:
    """The launcher must end its workers, which the terminal's interrupt does not reach."""
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = listen + (
        "import time; from pathlib import Path\n"
        "try:\n    Path('ready').touch(); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(1); Path('cleaned').touch()"
    )
    program = f"{listen}import sys; from launch.quickstart.phases import run_process\n"
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
