"""Signals, in a process of its own: what it exits with, and when."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from conf.system.entry import EXIT_INTERRUPTED, EXIT_STOPPED
from tests.helpers.processes import ROOT

# Says when it listens; deferred: works on for a moment after a signal, then exits with what pretrain.stop says.
SCRIPT = """
import sys, time
from conf.system.entry import exit_status
from pretrain.run import stop

def work():
    stop.listen()
    if "deferred" not in sys.argv:
        print("listening", flush=True)
        time.sleep(30)
    with stop.deferred():
        print("listening", flush=True)
        while stop.received() is None:
            time.sleep(0.01)
        print("finishing", flush=True)
        for _ in range(50 if "long" in sys.argv else 1):
            time.sleep(0.1)
        print("finished", flush=True)
        return stop.STATUS[stop.received()]

sys.exit(exit_status(work))
"""


def send(*signals: signal.Signals, mode: str = "now") -> tuple[int, str]:
    """Return exit status and output of the script after the signals."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *mode.split()], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    output = process.stdout.readline()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)
    output += process.communicate(timeout=20)[0]
    return process.returncode, output


# Waits inside torch for a rank that never starts, or for a master that does not resolve.
WAITING = """
import os, sys
from conf.schema import Device
from conf.system.entry import exit_status
from pretrain.run import stop

stop.listen()
from pretrain.run.process_group import choose_device, start_process_group

def work():
    print("listening", flush=True)
    if "deferred" in sys.argv:
        with stop.deferred():
            start_process_group(choose_device(Device.auto), 10)
    start_process_group(choose_device(Device.auto), 10)

sys.exit(exit_status(work))
"""


@pytest.mark.parametrize("master", ["127.0.0.1", "no-such-host.invalid"])
@pytest.mark.parametrize(
    ("numbers", "mode", "status"),
    [
        ((signal.SIGINT,), "now", EXIT_INTERRUPTED),
        ((signal.SIGTERM,), "now", EXIT_STOPPED),
        ((signal.SIGINT, signal.SIGINT), "deferred", EXIT_INTERRUPTED),
    ],
)
def test_a_signal_is_heard_while_ranks_wait_for_each_other(numbers, mode, status, master) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": master, "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", WAITING, mode]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | group, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1)
    begin = time.monotonic()
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.2)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert time.monotonic() - begin < 20
    assert "nothing new to save: the same command starts again" in errors


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, EXIT_STOPPED), (signal.SIGUSR1, EXIT_STOPPED), (signal.SIGINT, EXIT_INTERRUPTED)],
)
def test_a_signal_ends_the_process_after_its_step_or_at_once_before_the_first(number, status) -> None:
    assert send(number) == (status, "listening\n")
    assert send(number, mode="deferred") == (status, "listening\nfinishing\nfinished\n")


def test_further_signals_do_not_disturb_the_saving_and_the_first_one_decides() -> None:
    sent = (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)
    assert send(*sent, mode="deferred") == (EXIT_STOPPED, "listening\nfinishing\nfinished\n")


def test_a_second_ctrl_c_ends_it_at_once() -> None:
    status, output = send(signal.SIGINT, signal.SIGINT, mode="deferred long")
    assert (status, output) == (EXIT_INTERRUPTED, "listening\nfinishing\n")
