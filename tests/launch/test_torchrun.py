"""launch.torchrun: signals reach the ranks, their exit status is passed on, their output is logged."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launch.torchrun import choose_status, describe_crash, find_children, sort_exits
from tests.helpers.processes import ROOT, rank_environment
from tests.helpers.slurm_cluster import find_free_port

KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM


@pytest.mark.parametrize(
    ("exits", "status"),
    [
        ([75, 75], 75),
        ([75, KILLED], 75),  # the second did not end in the time that is left after the first
        ([TERMINATED, 75], 75),  # one was sent the signal before it handled signals
        ([130, 130], 130),
        ([75, 130], 130),
        ([-signal.SIGINT, 1], 130),
        ([2, KILLED], 2),
        ([1, 2], 2),  # a peer of the rank with the user error lost its connection
        ([1, 75], 1),  # the agent stopped the others after the crash
        ([KILLED, TERMINATED], 1),
        ([7], 1),
    ],
)
def test_the_ranks_statuses_become_one(exits: list[int], status: int) -> None:
    assert choose_status(exits) == status


def test_the_rank_that_was_killed_comes_before_those_that_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_DIR", "logs")
    exits = sort_exits({0: (1, 100), 3: (KILLED, 100), 1: (75, 100), 2: (KILLED, 130)})
    assert list(exits) == [3, 0, 1, 2]
    assert "rank 3 on " in describe_crash(exits)
    assert "by signal SIGKILL, and the others with it; its output: logs/rank_3.log" in describe_crash(exits)


def test_children_are_found_in_proc() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            assert find_children(os.getpid()).count(child.pid) == 1
        finally:
            child.kill()


def start(
    folder: Path, *plan: str, output: int = subprocess.PIPE, options: tuple[str, ...] = ()
) -> subprocess.Popen[bytes]:
    """Start the launcher with one rank per word of `plan` and logs in folder/logs. output: of both streams."""
    command = [sys.executable, "-m", "launch.torchrun", f"--nproc-per-node={len(plan)}", *options, "-m"]
    return subprocess.Popen(
        [*command, "tests.helpers.fake_rank", str(folder), *plan],
        cwd=ROOT,
        env=rank_environment() | {"LOG_DIR": str(folder / "logs")},
        stdout=output,
        stderr=subprocess.STDOUT,
    )


def end(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Wait, and return exit status and output."""
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, output.decode()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_rank_and_each_ends_in_its_own_time(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    process = start(tmp_path, f"wait:{status}", f"wait:{status}")
    wait_until(lambda: (tmp_path / "ready_0").exists() and (tmp_path / "ready_1").exists())
    process.send_signal(number)
    assert end(process) == (status, "rank 0 of 2 speaking\n")
    assert [(tmp_path / f"signal_{rank}").read_text() for rank in (0, 1)] == [number.name] * 2
    for rank in (0, 1):
        header, line = (tmp_path / "logs" / f"rank_{rank}.log").read_text().splitlines()
        assert header.startswith("== ") and "tests.helpers.fake_rank" in header
        assert line == f"rank {rank} of 2 speaking"


def test_a_killed_rank_is_named_and_the_others_are_ended(tmp_path: Path) -> None:
    status, output = end(start(tmp_path, "wait:75", "kill:9"))
    assert status == 1
    assert f"ended by signal SIGKILL, and the others with it; its output: {tmp_path}/logs/rank_1.log" in output
    assert output.count("error") == 1 and "Traceback" not in output
    assert (tmp_path / "signal_0").read_text() == "SIGTERM" or not (tmp_path / "ready_0").exists()


@pytest.mark.slow
def test_hosts_that_stop_one_after_the_other_exit_with_the_same_status(tmp_path: Path) -> None:
    """The host with the store stops first, but must not exit before the other had time to stop."""
    rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{find_free_port()}", "--rdzv-id=test")
    options = ("--nnodes=2", "--nproc-per-node=1", *rendezvous)
    hosts = [start(tmp_path, "wait:75", "wait:75", options=options) for _ in range(2)]
    wait_until(lambda: (tmp_path / "ready_0").exists() and (tmp_path / "ready_1").exists())
    for host in hosts:
        host.send_signal(signal.SIGUSR1)
        time.sleep(2)
    assert [end(host)[0] for host in hosts] == [75, 75]
    assert len(list((tmp_path / "logs").glob("console_*.log"))) == 1


def test_ranks_do_not_outlive_a_launcher_that_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "wait:0")
    wait_until((tmp_path / "ready_0").exists)
    [rank] = find_children(process.pid)
    process.kill()
    process.wait(60)
    wait_until(lambda: not psutil.pid_exists(rank) or psutil.Process(rank).status() == psutil.STATUS_ZOMBIE)
    assert not (tmp_path / "signal_0").exists()


def test_on_a_terminal_rank_0_has_a_terminal_and_a_user_error_is_quiet(tmp_path: Path) -> None:
    reader, terminal = pty.openpty()
    process = start(tmp_path, "exit:2", output=terminal)
    os.close(terminal)
    assert process.wait(120) == 2
    assert os.read(reader, 10000) == b"rank 0 of 1 speaking, to a terminal\r\n"
    os.close(reader)
    assert (tmp_path / "logs" / "rank_0.log").read_text().splitlines()[1:] == ["rank 0 of 1 speaking, to a terminal"]


def test_what_runs_must_be_a_module() -> None:
    command = [sys.executable, "-m", "launch.torchrun", "script.py"]
    result = subprocess.run(command, cwd=ROOT, env=rank_environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "-m MODULE" in result.stderr
