"""On SIGTERM, SIGUSR1 or Ctrl-C a run finishes its step, saves, and exits with a status that launchers know.

Standard library only, so that a signal is understood before torch is imported. Slurm sends SIGUSR1 ahead of the time
limit (`--signal=USR1@600`) and SIGTERM at preemption; both mean "start me again" (EXIT_STOPPED), Ctrl-C does not.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from conf.system.entry import EXIT_INTERRUPTED, EXIT_STOPPED

STATUS = {signal.SIGTERM: EXIT_STOPPED, signal.SIGUSR1: EXIT_STOPPED, signal.SIGINT: EXIT_INTERRUPTED}
_received: list[signal.Signals] = []
_depth = 0


def listen() -> None:
    """Catch the signals from now on. Until `deferred` there is nothing to save: one ends the process at once."""
    for number in STATUS:
        signal.signal(number, _note)


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


def _end(number: signal.Signals) -> None:
    """End at once: an exception could end up in an import under way, which may swallow it and go on half done."""
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{number.name} outside of the training loop, nothing new to save: the same command starts again",
            file=sys.stderr,
        )
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(STATUS[number])
