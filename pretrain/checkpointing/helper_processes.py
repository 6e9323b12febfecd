"""Processes that a rank starts to write checkpoints end with it, however it ends. Imports no torch.

Nobody else would end them: a killed rank cannot, and launchers know their ranks only. A writer that lives on would
write into the folder the next start saves to.
"""

import ctypes
import multiprocessing
import os
import signal
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from typing import Any

from pretrain.run.stop import STATUS

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def end_with_parent(parent: int) -> None:
    """Make this process, which `parent` started, end when its parent ends."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before this was said
        os._exit(1)


class SharedQueue:
    """Holds a queue between processes in a process of its own, which ends with this one and not before.

    A signal to all processes of a job asks ranks to save, which they cannot do without the queue: its process ignores
    what ranks are asked with.
    """

    def __init__(self) -> None:
        self._manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        resource_tracker.ensure_running()  # it would unblock signals while the manager starts
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STATUS)  # inherited by the process, which never looks
        try:
            self._manager.start(end_with_parent, (os.getpid(),))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.queue: Any = self._manager.Queue()

    @property
    def is_alive(self) -> bool:
        """Whether that process is running."""
        return self._manager._process.is_alive()  # type: ignore[attr-defined]
