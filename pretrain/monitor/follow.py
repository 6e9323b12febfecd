"""Reading metrics.jsonl as it grows, each line once."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.monitor.history import History
from pretrain.run.run_folder import METRICS_FILE

PIECE_BYTES = 1 << 24


class MetricsFollower:
    """history: of everything read. num_damaged: lines that are no JSON objects.

    A run that resumes or goes back replaces the file, without the lines of later steps: then it is read anew. A last
    line that is still being written is left for the next time.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / METRICS_FILE
        self._start_over(None)

    def read(self) -> None:
        """Takes in what is new. Raises: OSError but for a file that is not there (yet)."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._inode or found.st_size < self._offset:
                self._start_over(found.st_ino)
            file.seek(self._offset)
            rest = b""
            while piece := file.read(PIECE_BYTES):
                complete, _, rest = (rest + piece).rpartition(b"\n")
                self.history.extend(self._parse(complete))
            self._offset = file.tell() - len(rest)

    def _start_over(self, inode: int | None) -> None:
        self.history, self.num_damaged = History(), 0
        self._inode, self._offset = inode, 0

    def _parse(self, text: bytes) -> Iterator[dict[str, Any]]:
        for line in text.splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                values = None
            if isinstance(values, dict):
                yield values
            elif line.strip():
                self.num_damaged += 1
