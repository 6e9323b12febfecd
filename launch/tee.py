"""Copy the output of this process and its children to a log file, while children still see a terminal."""

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
LONGEST_LINE = 1 << 16  # bytes; a progress bar may redraw itself for days without ending its line
SECONDS_TO_DRAIN = 5.0


@contextmanager
def tee_output(log: Path | None) -> Iterator[None]:
    """Append standard output and error to `log` as well while the block runs; with None, change nothing.

    A terminal stays a terminal for the children, so that progress bars work, and the bars stay out of the log.
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
        os.dup2(original, stream)  # closes the last writer of this process, so that the thread sees the end
        thread.join(SECONDS_TO_DRAIN)  # a stray child may hold another writer


def _open_terminal(original: int) -> tuple[int, int]:
    """Open a pseudo-terminal as wide as the original that passes bytes on unchanged."""
    reader, writer = pty.openpty()
    tty.setraw(writer)
    fcntl.ioctl(writer, termios.TIOCSWINSZ, fcntl.ioctl(original, termios.TIOCGWINSZ, bytes(8)))
    return reader, writer


def _copy(reader: int, original: int, log: int) -> None:
    """Copy to the original and the log until the last writer is gone."""
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
    """Log what a line finally shows, without colours and overwritten parts."""
    text = TERMINAL_CODE.sub(b"", line).rstrip(b"\r").rsplit(b"\r", 1)[-1]
    if text or not line:
        _write(log, text + b"\n")


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 1 << 16)
    except OSError:  # a pseudo-terminal reports in this way that its last writer is gone
        return b""


def _write(target: int, data: bytes) -> None:
    """Write all bytes, and ignore errors: a closed console or a full disk must not end the training."""
    try:
        while data:
            data = data[os.write(target, data) :]
    except OSError:
        return
