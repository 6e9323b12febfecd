"""How far a run is: the counters it resumes from, and status.json, which launchers and the monitor read.

Standard library only.
"""

import json
import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path

from conf.system.atomic import atomic_write_text
from conf.system.errors import UserError
from conf.system.json_file import read_json_object

logger = logging.getLogger(__name__)

STATUS_FILE = "status.json"


@dataclass
class TrainState:
    """Counts what a run has done; beside weights and optimizer state, a resumed run needs nothing else.

    step: optimizer steps done. tokens_seen: clean tokens trained on. samples_seen: sequences trained on.
    samples_seen is also the global sample index of the next sequence: data order and noise are functions of it, and
    the learning rate is one of tokens_seen. No random state is consumed after the weights are drawn.
    """

    step: int = 0
    tokens_seen: int = 0
    samples_seen: int = 0

    def is_multiple_of(self, every_steps: int) -> bool:
        """Return whether what happens every so many steps is due now. 0: it is never."""
        return every_steps > 0 and self.step % every_steps == 0


class RunPhase(Enum):
    """running; stopped: saved and to be started again; complete: the token budget is spent; failed: see the reason."""

    running = "running"
    stopped = "stopped"
    complete = "complete"
    failed = "failed"


@dataclass
class KernelCounts:
    """Counts what torch.compile did for rank 0 since its process started.

    compiled_kernels, loaded_kernels: compiled here, or found in a cache. compile_seconds: both took together.
    recompiled_kernels: on all ranks, those that came after the first steps, in which there should be no more.
    """

    compiled_kernels: int = 0
    loaded_kernels: int = 0
    compile_seconds: float = 0.0
    recompiled_kernels: int = 0


@dataclass(frozen=True)
class RunStatus:
    """Holds what status.json says.

    state: a RunPhase's name. time: of writing, in seconds since 1970. pid, host: of rank 0. reason: why the run ended.
    """

    state: str
    step: int
    tokens_seen: int
    time: float
    pid: int
    host: str
    reason: str = ""
    kernels: KernelCounts = field(default_factory=KernelCounts)


def write_status(
    run_dir: Path, phase: RunPhase, state: TrainState, reason: str = "", kernels: KernelCounts | None = None
) -> None:
    """Replace status.json; a disk that refuses it is a warning."""
    path, now = run_dir / STATUS_FILE, time.time()
    me, counts = (os.getpid(), socket.gethostname()), kernels or KernelCounts()
    status = RunStatus(phase.value, state.step, state.tokens_seen, now, *me, reason, counts)
    try:
        atomic_write_text(path, json.dumps(asdict(status)) + "\n")
    except OSError as error:  # a run does not end for it
        logger.warning(f"{path} cannot be written: {error}")


def load_status(run_dir: Path | str) -> RunStatus | None:
    """Return the status of a run, or None if it never had one. Raises: UserError if the file is damaged."""
    path = Path(run_dir) / STATUS_FILE
    if not path.exists():
        return None
    values = read_json_object(path, "")
    kernels = KernelCounts(**values.pop("kernels", {}))
    return RunStatus(**values, kernels=kernels)


def peek_at_status(run_dir: Path | str) -> RunStatus | None:
    """Return load_status for those who only look on: None also for a file that cannot be understood."""
    with suppress(UserError, OSError, TypeError):  # TypeError: a version with other fields
        return load_status(run_dir)
    return None
