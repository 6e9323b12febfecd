"""Processes a rank starts to write checkpoints: they end with it, however it ends. Needs no torch.

Nobody else would end them: a killed rank cannot, and launchers know their ranks only. A writer that lives on would
write into the folder the next start saves to.
"""

import ctypes
import multiprocessing
import os
import signal
from multiprocessing.managers import SyncManager
from typing import Any

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def end_with_parent(parent: int) -> None:
    """To be called in a process that `parent` started: from now on the end of one is the end of the other."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before this was said
        os._exit(1)


def start_queue() -> Any:
    """A queue between processes, held by a process of its own that ends with this one."""
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(end_with_parent, (os.getpid(),))
    return manager.Queue()
