"""One start that is killed: waiting for the moment, the kill, and what became of it."""

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import psutil

from conf.system.entry import EXIT_INTERRUPTED, EXIT_STOPPED
from model.checkpoint.layout import find_newest_complete, step_of
from tests.bench.chaos.job import SAVE_EVERY, Job, Start
from tests.bench.chaos.plan import LAUNCHER, Kill, Moment
from tests.bench.chaos.watch import Phase, Watch
from tests.helpers.processes import kill_tree

LONGEST_MOMENT, LONGEST_END, LONGEST_LEFTOVER = 120.0, 90.0, 10.0  # seconds
POLL_SECONDS = 0.005
EXIT_OF = {Signals.SIGTERM: EXIT_STOPPED, Signals.SIGUSR1: EXIT_STOPPED, Signals.SIGINT: EXIT_INTERRUPTED}


class ChaosError(AssertionError):
    """The run did what it must not do."""


@dataclass
class Durations:
    """How long a moment lasts, in seconds, measured on the run that nobody kills."""

    start: float
    load: float
    step: float
    save: float
    evaluation: float


@dataclass(frozen=True)
class Outcome:
    """Record what became of one kill.

    phase: where it struck; None where the run ended before. status: of the launcher. end_seconds: from the kill until
    no process was left. first_step: of the checkpoint it began with. last_step: written down last. next_step: where the
    next start begins. lost_steps: to be done again. allowed_steps: one save interval and those made while a save was in
    flight. bad: what is wrong, if anything.
    """

    kill: Kill
    phase: Phase | None
    status: int
    end_seconds: float
    first_step: int
    last_step: int
    next_step: int
    lost_steps: int
    allowed_steps: int
    bad: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they are written to a file."""
        names = {"phase": self.phase.value if self.phase else None, "bad": list(self.bad)}
        kill = asdict(self.kill) | {"signal": self.kill.signal.name, "moment": self.kill.moment.value}
        rest = {key: value for key, value in vars(self).items() if key not in ("kill", *names)}
        return {**kill, **rest, **names}


def strike(job: Job, kill: Kill, durations: Durations) -> Outcome:
    """Start the job, kill one of its processes and wait for the end of all; raise ChaosError if it hangs."""
    watch = Watch(job.run_dir, kill.asynchronous)
    start = Start(job, kill.asynchronous)
    try:
        _await(kill, watch, start, durations)
        struck = start.launcher.poll() is None
        phase = watch.observe() if struck else None
        in_flight = watch.saving
        if struck:
            _send(kill, start)
        began = time.monotonic()
        status, left = _await_end(start)
        seconds = time.monotonic() - began
    finally:
        kill_tree(start.launcher.pid)
        for pid in start.find_processes():
            kill_tree(pid)
    return _judge(kill, watch, phase, status, seconds, in_flight, left)


def _await(kill: Kill, watch: Watch, start: Start, durations: Durations) -> None:
    """Wait until the moment has come and the drawn share of it is over, or the job has ended."""
    lasts = getattr(durations, kill.moment.value) * kill.delay
    has_come: Callable[[], bool] = {
        Moment.start: lambda: True,
        Moment.load: lambda: watch.is_loading,
        Moment.step: lambda: len(watch.trained) >= kill.steps,
        Moment.save: lambda: watch.saving is not None,
        Moment.evaluation: lambda: watch.is_evaluating,
    }[kill.moment]
    deadline = time.monotonic() + LONGEST_MOMENT
    while not has_come() and start.launcher.poll() is None:
        if time.monotonic() > deadline:
            raise ChaosError(f"no {kill.moment.value} within {LONGEST_MOMENT:.0f} s of the start at {watch.newest}")
        time.sleep(POLL_SECONDS)
    time.sleep(lasts)
    if kill.rank != LAUNCHER:
        while start.find_rank(kill.rank) is None and start.launcher.poll() is None:
            time.sleep(POLL_SECONDS)


def _send(kill: Kill, start: Start) -> None:
    pid = start.launcher.pid if kill.rank == LAUNCHER else start.find_rank(kill.rank)
    try:
        os.kill(pid or start.launcher.pid, kill.signal)
    except ProcessLookupError:  # ended in this moment
        return


def _await_end(start: Start) -> tuple[int, list[str]]:
    """Return the launcher's status and the processes that outlived it for too long; raise ChaosError if it hangs."""
    try:
        status = start.launcher.wait(LONGEST_END)
    except subprocess.TimeoutExpired:
        raise ChaosError(f"still running {LONGEST_END:.0f} s after the kill: {start.find_processes()}") from None
    deadline = time.monotonic() + LONGEST_LEFTOVER
    while (left := start.find_processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return status, [_describe(pid) for pid in left]


def _describe(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())[-120:]
    except psutil.Error:
        return "one that is gone"


def _judge(
    kill: Kill, watch: Watch, phase: Phase | None, status: int, seconds: float, in_flight: int | None, left: list[str]
) -> Outcome:
    trained, next_step = watch.trained, _newest_step(watch.run_dir)
    last = max(trained, default=watch.first_step)
    lost = max(0, last - next_step)
    allowed = SAVE_EVERY + (max(0, last - in_flight) if in_flight else 0)
    bad = []
    if lost > allowed:
        bad.append(f"{lost} steps lost, at most {allowed} may be")
    if next_step < watch.first_step:
        bad.append(f"it began at step {watch.first_step} and left {next_step}")
    if left:
        bad.append(f"outlived their launcher by {LONGEST_LEFTOVER:.0f} s: {left}")
    if watch.restored and watch.restored[0] != watch.first_step:
        bad.append(f"it read step {watch.restored[0]}, the newest complete one was {watch.first_step}")
    if phase is not None and status not in _allowed_statuses(kill, phase):
        bad.append(f"status {status} after {kill.signal.name} during {phase.value}")
    if kill.signal in EXIT_OF and phase not in (None, Phase.start, Phase.load) and kill.rank != LAUNCHER and lost:
        bad.append(f"{kill.signal.name} lost {lost} steps")
    return Outcome(kill, phase, status, round(seconds, 2), watch.first_step, last, next_step, lost, allowed, tuple(bad))


def _allowed_statuses(kill: Kill, phase: Phase) -> set[int]:
    """Return the statuses a launcher may end with; 0 means that the run was done, or in its last moments."""
    at_once = {-kill.signal} if kill.rank == LAUNCHER and phase is Phase.start else set()  # before it listens
    if kill.signal is not Signals.SIGKILL:
        return {0, EXIT_OF[kill.signal], *at_once}
    return {-Signals.SIGKILL} if kill.rank == LAUNCHER else {0, 1}


def _newest_step(run_dir: Path) -> int:
    newest = find_newest_complete(run_dir)
    return step_of(newest) if newest else 0
