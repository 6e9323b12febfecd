"""File locks, which the system releases however the process ends. Standard library only."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)


def wait_for_lock(file: IO) -> None:
    """Lock the open `file` as soon as no other process holds it.

    On file systems without locks this returns at once, so what is written under the lock must be the same whichever
    process writes it.
    """
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)


def try_lock(file: IO) -> bool:
    """Lock the open `file` unless another live process holds it. Returns False if one does.

    Some network file systems have no locks: then nothing is locked, and a warning is logged.
    """
    return _try_lock(file.fileno(), file.name)


@contextmanager
def locking_directory(directory: Path) -> Iterator[bool]:
    """Lock a directory while the block runs; yield what try_lock returns. Nothing is written into it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _try_lock(descriptor, str(directory))
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, name: str) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning(f"{name} cannot be locked ({error.strerror}): let no other process write to its folder")
    return True
