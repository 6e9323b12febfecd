"""What metrics.jsonl says, held in memory in little space: a run of 500 thousand steps takes 50 MB."""

import math
from array import array
from collections.abc import Iterable
from typing import Any

LOSSES = ("loss", "ar_loss", "diffusion_loss", "acceptance_length")
NUMBERS = (
    *("step", "tokens_seen", *LOSSES),
    *("grad_norm", "lr", "step_seconds", "data_seconds", "tokens_per_second", "mfu", "memory_bytes", "skipped"),
    *("slowest_rank", "slowest_ratio"),
)


class Columns:
    """Numbers of one kind of lines, by name, in the order of the lines. NaN: not known, or not finite."""

    def __init__(self) -> None:
        self._columns = {name: array("d") for name in NUMBERS}

    def __len__(self) -> int:
        return len(self._columns["step"])

    def __getitem__(self, name: str) -> "array[float]":
        return self._columns[name]

    def append(self, line: dict[str, Any]) -> None:
        """One line."""
        for name, column in self._columns.items():
            value = line.get(name)
            column.append(float(value) if isinstance(value, int | float) else math.nan)

    def last(self, name: str) -> float | None:
        """The newest number that is known."""
        column = self._columns[name]
        return next((value for value in reversed(column) if math.isfinite(value)), None)

    def recent(self, name: str, count: int) -> list[float]:
        """Those known among the newest `count`."""
        return [value for value in self._columns[name][-count:] if math.isfinite(value)]

    def has(self, name: str) -> bool:
        """Whether any is known."""
        return any(math.isfinite(value) for value in self._columns[name])


class History:
    """All lines so far. train, heldout: numbers; checkpoints, restores, events: the lines themselves."""

    def __init__(self) -> None:
        self.train, self.heldout = Columns(), Columns()
        self.checkpoints: list[dict[str, Any]] = []
        self.restores: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []

    def extend(self, lines: Iterable[dict[str, Any]]) -> None:
        """Takes new lines; kinds that are not known are passed over."""
        columns = {"train": self.train, "heldout": self.heldout}
        lists = {"checkpoint": self.checkpoints, "restore": self.restores, "event": self.events}
        for line in lines:
            kind = line.get("kind")
            if kind in columns:
                columns[kind].append(line)
            elif kind in lists:
                lists[kind].append(line)
