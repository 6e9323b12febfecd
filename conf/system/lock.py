"""Holding a file for one process; the system lets go of it however the process ends. Standard library only."""

import fcntl
import logging
from contextlib import suppress
from typing import IO

logger = logging.getLogger(__name__)


def wait_for_lock(file: IO) -> None:
    """Lock the open `file` as soon as no other process holds it. Where there are no locks nothing is held: whoever
    waits so must write what any of them may write."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)


def try_lock(file: IO) -> bool:
    """Lock the open `file` unless another live process holds it; whether it did not.

    Some network file systems have no locks: then nothing is held, which is a warning.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning(f"{file.name} cannot be locked ({error.strerror}): let no other process write to its folder")
    return True
