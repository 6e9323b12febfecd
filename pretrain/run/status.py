"""status.json of a run folder: what launchers and the monitor ask. Standard library only."""

import json
import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from conf.system.atomic import atomic_write_text
from conf.system.errors import UserError
from conf.system.json_file import read_json_object

logger = logging.getLogger(__name__)

STATUS_FILE = "status.json"
REFRESH_SECONDS = 10.0


class RunPhase(Enum):
    """running; stopped: saved and to be started again; complete: the token budget is spent; failed: see the reason."""

    running = "running"
    stopped = "stopped"
    complete = "complete"
    failed = "failed"


@dataclass(frozen=True)
class RunStatus:
    """state: a RunPhase's name. time: of writing, in seconds since 1970. pid, host: of rank 0. reason: why it ended."""

    state: str
    step: int
    tokens_seen: int
    time: float
    pid: int
    host: str
    reason: str = ""


class StatusWriter:
    """Rank 0's writer."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._written = run_dir / STATUS_FILE, float("-inf")

    def write(self, phase: RunPhase, step: int, tokens_seen: int, reason: str = "") -> None:
        """Replaces status.json; a status that runs is written at most every REFRESH_SECONDS."""
        now = time.monotonic()
        if phase is RunPhase.running and now - self._written < REFRESH_SECONDS:
            return
        self._written = now
        status = RunStatus(phase.value, step, tokens_seen, time.time(), os.getpid(), socket.gethostname(), reason)
        try:
            atomic_write_text(self._path, json.dumps(asdict(status)) + "\n")
        except OSError as error:  # a run does not end for it
            logger.warning(f"{self._path} cannot be written: {error}")


def load_status(run_dir: Path | str) -> RunStatus | None:
    """The status of a run, or None if it never had one. Raises: UserError if the file is damaged."""
    path = Path(run_dir) / STATUS_FILE
    return RunStatus(**read_json_object(path, "")) if path.exists() else None


def peek_at_status(run_dir: Path | str) -> RunStatus | None:
    """load_status for those who only look on: None also for a file that cannot be understood."""
    with suppress(UserError, OSError, TypeError):  # TypeError: a version with other fields
        return load_status(run_dir)
    return None
