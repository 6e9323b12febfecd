"""Start threads that a process does not wait for when it ends, except for a moment.

A read that hangs must not keep the process from ending, so the threads are daemons. But one that is within torch when
the interpreter goes away aborts the process: so they are given a few seconds to come to an end.
"""

import atexit
import time
from collections.abc import Callable
from threading import Event, Thread
from typing import Any
from weakref import WeakSet

END_SECONDS = 5.0
is_ending = Event()  # set when the process ends: a thread is to begin nothing more
_threads: WeakSet[Thread] = WeakSet()


def start_daemon(name: str, action: Callable[..., None], *arguments: Any) -> Thread:
    """Start a thread that does `action`; see the module."""
    thread = Thread(target=action, args=arguments, name=name, daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


@atexit.register
def _end() -> None:
    is_ending.set()
    deadline = time.monotonic() + END_SECONDS
    for thread in list(_threads):
        thread.join(max(0.0, deadline - time.monotonic()))
