"""No rank waits for ever: for one that was killed, one that stands still, or data that never come."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.chaos.job import Job, Start
from tests.bench.chaos.watch import Watch
from tests.distributed.test_guard import WORKER, build_job
from tests.helpers.processes import ROOT, kill_tree, rank_environment, torchrun
from tests.helpers.toy_data import ToyData

pytestmark = pytest.mark.slow

TIMEOUT_SECONDS = 12.0  # of collectives, runtime.timeout_minutes
GROUPS_SECONDS = 60.0  # the same of megatron-core's groups, which count in whole minutes
AGENT_SECONDS = 30.0  # torchrun's agent waits so long for a rank that does not end by SIGTERM


class ShortTimeout(Job):
    """A long run whose collectives wait for TIMEOUT_SECONDS."""

    def overrides(self, asynchronous: bool) -> list[str]:
        return [*super().overrides(asynchronous), f"runtime.timeout_minutes={TIMEOUT_SECONDS / 60}"]


@pytest.fixture(params=["pp2", "tp2_sp", "single"])
def started(toy_data: ToyData, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Start a run and wait until it has done a few steps."""
    job = ShortTimeout(toy_data, tmp_path, "run", 2000, request.param)
    watch, start = Watch(job.run_dir, asynchronous=False), Start(job, asynchronous=False)
    try:
        deadline = time.monotonic() + 120
        while len(watch.trained) < 5:
            assert start.launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield start
    finally:
        for pid in [start.launcher.pid, *start.find_processes()]:
            kill_tree(pid)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others_at_once(started: Start, rank: int) -> None:
    pid = started.find_rank(rank)
    assert pid is not None
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert started.launcher.wait(AGENT_SECONDS) == 1
    assert time.monotonic() - began < TIMEOUT_SECONDS, "it was noticed, not timed out"
    time.sleep(1)
    assert started.find_processes() == []


def test_a_rank_that_stands_still_is_given_up_after_the_timeout(started: Start) -> None:
    pid = started.find_rank(1)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    assert started.launcher.wait(GROUPS_SECONDS + AGENT_SECONDS + 30) == 1
    time.sleep(1)
    assert started.find_processes() == []
    assert "Timed out waiting" in (started.job.run_dir / "logs" / "rank_0.log").read_text()


def test_a_process_whose_data_never_come_leaves_its_stacks_and_ends(toy_data: ToyData, tmp_path: Path) -> None:
    job = build_job(
        *(toy_data, tmp_path, "run", "runtime.stall_timeout_minutes=0.15", "checkpoint.every_steps=0"),
        poison={},
        slow_rank=1,
        hangs_at=16,
    )
    (tmp_path / "jobs.json").write_text(json.dumps([job]), encoding="utf-8")
    command = torchrun(2, WORKER, str(tmp_path / "jobs.json"))
    began = time.monotonic()
    done = subprocess.run(command, env=rank_environment(), cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert done.returncode != 0
    assert time.monotonic() - began < 100
    stacks = (tmp_path / "run" / "logs" / "stall_rank_1.txt").read_text()
    assert "poisoned_jobs.py" in stacks and "in slow" in stacks
