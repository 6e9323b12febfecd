"""Ends a process that makes no progress: whatever it waits for (a dead peer, a lost file system), it does not hang.

Collectives have a timeout of their own (runtime.timeout_minutes); this one also covers reading, writing and CUDA. It
runs in a thread of the interpreter that needs no lock, so it works while Python is blocked.
"""

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

STACKS_FOLDER = "logs"


class Watchdog:
    """After `minutes` without a sign of life it writes all stacks to `logs/stall_rank_<r>.txt` and ends the process."""

    def __init__(self, run_dir: Path, rank: int, minutes: float) -> None:
        self._seconds = minutes * 60
        self._path = run_dir / STACKS_FOLDER / f"stall_rank_{rank}.txt"
        self._file: IO[str] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts while the block runs."""
        self.alive()
        try:
            yield
        finally:
            self._stop()

    def alive(self) -> None:
        """Start, or start again, to count."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")  # stacks of an earlier start stay
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)

    def _stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            self._file = None
            if not self._path.stat().st_size:
                self._path.unlink()
