"""On SIGTERM, SIGUSR1 or Ctrl-C a run finishes its step, saves, and exits with a status that launchers know.

Standard library only, so that a signal is understood before torch is imported. Slurm sends SIGUSR1 ahead of the time
limit (`--signal=USR1@600`) and SIGTERM at preemption; both mean "start me again" (EXIT_STOPPED), Ctrl-C does not.

Python runs a signal's handler between two of its own instructions. A process that waits inside a library, for a rank
that never starts or a master that does not resolve, would not hear it for minutes: a thread hears it then.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

from conf.system.entry import EXIT_INTERRUPTED, EXIT_STOPPED

STATUS = {signal.SIGTERM: EXIT_STOPPED, signal.SIGUSR1: EXIT_STOPPED, signal.SIGINT: EXIT_INTERRUPTED}
SECONDS_TO_BE_HEARD = 3.0
_received: list[signal.Signals] = []
_depth = 0
_wakeup: socket.socket | None = None  # where the interpreter writes the number of every signal at once


def listen() -> None:
    """Catch the signals from now on. Until `deferred` there is nothing to save: one ends the process at once."""
    global _wakeup
    for number in STATUS:
        signal.signal(number, _note)
    if _wakeup is None:
        reader, _wakeup = socket.socketpair()
        _wakeup.setblocking(False)
        signal.set_wakeup_fd(_wakeup.fileno(), warn_on_full_buffer=False)
        Thread(target=_hear, args=(reader,), daemon=True, name="signals").start()


@contextmanager
def deferred() -> Iterator[None]:
    """Only note signals (`received`) while the block runs, except a second Ctrl-C, which interrupts at once."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def received() -> signal.Signals | None:
    """Return the first signal this process was sent, if any."""
    return _received[0] if _received else None


def _note(number: int, frame: FrameType | None) -> None:
    received_before = signal.SIGINT in _received
    _received.append(signal.Signals(number))
    if not _depth:
        _end(signal.Signals(number))
    if number == signal.SIGINT and received_before:
        raise KeyboardInterrupt


def _hear(reader: socket.socket) -> None:
    """End the process after a signal that its main thread does not notice: one to end at once, or a second Ctrl-C."""
    sent: list[int] = []
    while byte := reader.recv(1):
        if byte[0] not in STATUS:
            continue
        sent.append(byte[0])
        deadline = time.monotonic() + SECONDS_TO_BE_HEARD
        while len(_received) < len(sent) and time.monotonic() < deadline:
            time.sleep(0.05)
        is_second = byte[0] == signal.SIGINT and sent.count(signal.SIGINT) > 1
        if len(_received) < len(sent) and (is_second or not _depth):
            _end(signal.Signals(byte[0]))


def _end(number: signal.Signals) -> None:
    """End at once: an exception could end up in an import under way, which may swallow it and go on half done."""
    if os.environ.get("RANK", "0") == "0":
        where = "again, in the middle of a step" if _depth else "outside of the training loop"
        print(f"{number.name} {where}, nothing new to save: the same command starts again", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(STATUS[number])
