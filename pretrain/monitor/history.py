"""Reads metrics.jsonl as it grows and holds it in little memory: a run of 500 thousand steps takes 50 MB."""

import json
import math
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pretrain.run.run_folder import METRICS_FILE

LOSSES = ("loss", "ar_loss", "diffusion_loss", "acceptance_length")
NUMBERS = (
    *("step", "tokens_seen", *LOSSES),
    *("grad_norm", "lr", "step_seconds", "data_seconds", "tokens_per_second", "mfu", "memory_bytes", "skipped"),
    *("slowest_rank", "slowest_ratio", "useful_positions", "computed_positions"),
    *("rank_imbalance", "undealt_rank_imbalance"),
)
CHUNK_BYTES = 1 << 24


class Columns:
    """Holds the numbers of one kind of lines, by name, in the order of the lines. NaN: unknown or not finite."""

    def __init__(self) -> None:
        self._columns = {name: array("d") for name in NUMBERS}

    def __len__(self) -> int:
        return len(self._columns["step"])

    def __getitem__(self, name: str) -> "array[float]":
        return self._columns[name]

    def append(self, line: dict[str, Any]) -> None:
        """Append one line."""
        for name, column in self._columns.items():
            value = line.get(name)
            column.append(float(value) if isinstance(value, int | float) else math.nan)

    def last(self, name: str) -> float | None:
        """Return the newest number that is known."""
        column = self._columns[name]
        return next((value for value in reversed(column) if math.isfinite(value)), None)

    def recent(self, name: str, count: int) -> list[float]:
        """Return those that are known among the newest `count`."""
        return [value for value in self._columns[name][-count:] if math.isfinite(value)]

    def has(self, name: str) -> bool:
        """Return whether any number of this name is known."""
        return any(math.isfinite(value) for value in self._columns[name])


class History:
    """Holds all lines so far. train, heldout: numbers; checkpoints, restores, events: the lines themselves."""

    def __init__(self) -> None:
        self.train, self.heldout = Columns(), Columns()
        self.checkpoints: list[dict[str, Any]] = []
        self.restores: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []

    def extend(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add new lines; kinds that are not known are skipped."""
        columns = {"train": self.train, "heldout": self.heldout}
        lists = {"checkpoint": self.checkpoints, "restore": self.restores, "event": self.events}
        for line in lines:
            kind = line.get("kind")
            if kind in columns:
                columns[kind].append(line)
            elif kind in lists:
                lists[kind].append(line)


class MetricsFollower:
    """Keeps a history of everything read. num_damaged: lines that are no JSON objects.

    A run that resumes or goes back replaces the file, without the lines of later steps: then it is read anew. A last
    line that is still being written is left for the next time.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / METRICS_FILE
        self._start_over(None)

    def read(self) -> None:
        """Read what is new. Raises: OSError, except for a file that is not there (yet)."""
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
            while chunk := file.read(CHUNK_BYTES):
                complete, _, rest = (rest + chunk).rpartition(b"\n")
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
