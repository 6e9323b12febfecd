"""A copy of everything that this process and its children print, in a log file, while the terminal stays a terminal."""

import fcntl
import os
import pty
import re
import termios
import threading
import tty
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

STDOUT, STDERR = 1, 2
TERMINAL_CODE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")
LONGEST_LINE = 1 << 16  # bytes; a progress bar redraws itself for days without ending its line
SECONDS_TO_DRAIN = 5.0


@contextmanager
def tee_output(log: Path | None) -> Iterator[None]:
    """While the block runs, standard output and error also go to `log`, appended; without one nothing changes.

    What was a terminal is one for the children too (progress bars work), and their bars stay out of the log.
    """
    if log is None:
        yield
        return
    with log.open("ab", buffering=0) as file, ExitStack() as stack:
        for stream in (STDOUT, STDERR):
            stack.enter_context(_tee(stream, file.fileno()))
        yield


@contextmanager
def _tee(stream: int, log: int) -> Iterator[None]:
    original = os.dup(stream)
    reader, writer = _open_terminal(original) if os.isatty(original) else os.pipe()
    os.dup2(writer, stream)
    os.close(writer)
    thread = threading.Thread(target=_copy, args=(reader, original, log), daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.dup2(original, stream)  # closes the last writer of this process: the thread sees the end
        thread.join(SECONDS_TO_DRAIN)  # a stray child may hold another


def _open_terminal(original: int) -> tuple[int, int]:
    """A pseudo-terminal as wide as the original, which passes on what is written as it is."""
    reader, writer = pty.openpty()
    tty.setraw(writer)
    fcntl.ioctl(writer, termios.TIOCSWINSZ, fcntl.ioctl(original, termios.TIOCGWINSZ, bytes(8)))
    return reader, writer


def _copy(reader: int, original: int, log: int) -> None:
    """Until the last writer is gone."""
    pending = b""
    while chunk := _read(reader):
        _write(original, chunk)
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            _log_line(line, log)
        pending = pending[-LONGEST_LINE:]
    if pending:
        _log_line(pending, log)


def _log_line(line: bytes, log: int) -> None:
    """What a line shows in the end, without colours, and without what was overwritten in it."""
    text = TERMINAL_CODE.sub(b"", line).rstrip(b"\r").rsplit(b"\r", 1)[-1]
    if text or not line:
        _write(log, text + b"\n")


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 1 << 16)
    except OSError:  # how a pseudo-terminal says that its last writer is gone
        return b""


def _write(target: int, data: bytes) -> None:
    """A console that went away or a full disk must not end the training."""
    try:
        while data:
            data = data[os.write(target, data) :]
    except OSError:
        return
