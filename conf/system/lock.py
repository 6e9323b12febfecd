"""File locks, which the system releases however the process ends. Standard library only."""

import fcntl
import logging
from contextlib import suppress
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
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning(f"{file.name} cannot be locked ({error.strerror}): let no other process write to its folder")
    return True
