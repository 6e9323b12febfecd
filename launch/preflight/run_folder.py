"""Whether the run folder is free and can be written."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from conf.system.lock import try_lock
from launch.preflight.findings import Finding, failed, ok, warning
from launch.preflight.subject import Subject, nearest_existing
from pretrain.run.run_folder import LOCK_FILE
from pretrain.run.status import STATUS_FILE, RunPhase, peek_at_status

PROBE_BYTES = 4096
# A live run renews its status with its steps; one that is older than this has probably ended without saying so.
LIVE_SECONDS = 120.0


def check_run_folder(subject: Subject) -> Iterator[Finding]:
    """Nobody else's at the moment, and writable: a probe file is written, brought to disk and deleted."""
    run_dir = subject.run_dir
    owner = _find_owner(run_dir / LOCK_FILE)
    if owner is not None:
        yield failed(f"{run_dir} is in use by another run ({owner}): wait for it, stop it, or choose another run.name")
    else:
        yield from _find_signs_of_life(run_dir)
    folder = nearest_existing(run_dir)
    try:
        _write_probe(folder)
    except OSError as error:
        yield failed(f"{folder} cannot be written ({error}): mend it, or choose another run.root")
        return
    if owner is None:
        yield ok(f"{run_dir} is free and writable" if run_dir.exists() else f"{run_dir} can be made in {folder}")


def _find_owner(lock: Path) -> str | None:
    """What the lock file says about the live process that holds it; None if nobody does."""
    if not lock.exists():
        return None
    with lock.open("r+", encoding="utf-8") as file:
        return None if try_lock(file) else file.read().strip() or "owner unknown"


def _find_signs_of_life(run_dir: Path) -> Iterator[Finding]:
    """Where the file system has no locks, only this tells of a run on another machine."""
    status = peek_at_status(run_dir)
    if status is None or status.state != RunPhase.running.value or status.host == socket.gethostname():
        return
    age = time.time() - status.time
    if age < LIVE_SECONDS:
        yield warning(
            f"{run_dir / STATUS_FILE} was renewed {age:.0f} s ago by a run on {status.host}, although nobody holds the "
            "lock (some network file systems have none): see that it has ended"
        )


def _write_probe(folder: Path) -> None:
    """Raises OSError."""
    probe = folder / f".preflight_{socket.gethostname()}_{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(os.urandom(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)
