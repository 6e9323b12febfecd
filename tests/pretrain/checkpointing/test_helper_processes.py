"""The processes a rank starts to write checkpoints survive a request to stop the job, and end with the rank."""

import os
import signal
import subprocess
import sys
import time

import psutil

from tests.helpers.processes import ROOT

SCRIPT = """
import time
from pretrain.run import stop
from pretrain.checkpointing.helper_processes import SharedQueue

if __name__ == "__main__":
    stop.listen()
    with stop.deferred():
        shared = SharedQueue()
        print("ready", flush=True)
        while stop.received() is None:
            time.sleep(0.01)
        time.sleep(0.3)
        shared.queue.put(7)
        print(shared.queue.get(), shared.is_alive, flush=True)
        time.sleep(60)
"""


def test_it_outlives_a_signal_to_all_processes_and_not_its_rank(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert helpers
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        os.killpg(process.pid, number)
    assert process.stdout.readline() == "7 True\n"
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(helper.is_running() and helper.status() != psutil.STATUS_ZOMBIE for helper in helpers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
