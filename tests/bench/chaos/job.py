"""The run that is disturbed: a toy on two ranks, started as users start it, with a launcher that may be killed."""

import os
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.helpers.layouts import LAYOUTS
from tests.helpers.processes import ROOT, rank_environment
from tests.helpers.toy_data import ToyData, tokens_of

NUM_RANKS = 2
SAVE_EVERY, EVALUATE_EVERY = 4, 6
MARK = "CHAOS_RUN"  # in the environment of every process of one start


@dataclass(frozen=True)
class Job:
    """A run under one layout, named in tests/helpers/layouts.py."""

    data: ToyData
    root: Path
    name: str
    steps: int
    layout: str

    @property
    def run_dir(self) -> Path:
        return self.root / self.name

    def overrides(self, asynchronous: bool) -> list[str]:
        """Return the overrides the run is started with."""
        return [
            *self.data.overrides(),
            f"run.root={self.root}",
            f"run.name={self.name}",
            "stage=joint",
            *LAYOUTS[self.layout],
            tokens_of(self.steps),
            f"checkpoint.every_steps={SAVE_EVERY}",
            f"evaluation.every_steps={EVALUATE_EVERY}",
            f"checkpoint.asynchronous={str(asynchronous).lower()}",
        ]


@dataclass
class Start:
    """One start of a job: the launcher and everything below it."""

    job: Job
    asynchronous: bool
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    launcher: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        options = [f"--nproc-per-node={NUM_RANKS}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        command = [sys.executable, "-m", "launch.torchrun", *options, "-m", "pretrain.train"]
        logs = self.job.run_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        environment = {**rank_environment(), "LOG_DIR": str(logs), MARK: self.mark}
        self.launcher = subprocess.Popen(
            [*command, *self.job.overrides(self.asynchronous)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def find_rank(self, rank: int) -> int | None:
        """Return the process of a rank; None before there is one."""
        try:
            for child in psutil.Process(self.launcher.pid).children():
                if child.environ().get("RANK") == str(rank):
                    return child.pid
        except psutil.Error:
            pass
        return None

    def find_processes(self) -> list[int]:
        """Find every live process of this start, wherever it moved."""
        wanted = f"{MARK}={self.mark}\0".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if wanted in path.read_bytes() and int(path.parent.name) != os.getpid():
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found
