"""metrics.jsonl, to which a run writes one JSON object per line."""

import json
import logging
import math
import os
import resource
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from conf.system.atomic import atomic_write_text
from pretrain.run.reporters import Reporter
from pretrain.run.run_folder import METRICS_FILE

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Appends lines on rank 0, after dropping those of steps after `step` that a run killed later has left; all at 0.

    Events stay: what happened to a run remains known, whatever it goes back to.

    reporters: who gets the numbers too (pretrain/run/reporters.py).
    """

    def __init__(self, run_dir: Path, step: int, reporters: Sequence[Reporter] = ()) -> None:
        self._path = run_dir / METRICS_FILE
        self._reporters = reporters
        self._file = self._open_after(step)
        self._pending: list[str] = []
        self._complained = False

    def write(self, kind: str, step: int, tokens_seen: int, values: Mapping[str, float | int | str | None]) -> None:
        """Append one line {"kind", "step", "tokens_seen", **values}; reporters get the numbers among the values."""
        values = {name: None if _is_nan(value) else value for name, value in values.items()}  # JSON has no NaN
        line = {"kind": kind, "step": step, "tokens_seen": tokens_seen, **values}
        self._pending.append(json.dumps(line) + "\n")
        self._flush()
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, float | int)}
        for reporter in self._reporters:
            with suppress(OSError):
                reporter.report(numbers, step)

    def _flush(self) -> None:
        """Write what is pending; lines that the disk does not take wait for the next one, and the run goes on."""
        end = os.fstat(self._file.fileno()).st_size
        try:
            content = "".join(self._pending).encode()
            if self._file.write(content) < len(content):
                raise OSError("disk full")
            self._pending = []
        except OSError as error:
            os.ftruncate(self._file.fileno(), end)
            if not self._complained:
                logger.warning(f"{self._path} cannot be written ({error}): its lines are kept until it can")
            self._complained = True

    def drop_after(self, step: int) -> None:
        """Forget later steps, except events: the run goes back to `step`."""
        self._file.close()
        self._file = self._open_after(step)
        for reporter in self._reporters:
            reporter.go_back(step)

    def close(self) -> None:
        """Bring everything to disk."""
        with suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()
        for reporter in self._reporters:
            with suppress(OSError):
                reporter.close()

    def _open_after(self, step: int) -> FileIO:
        _drop_lines_after(self._path, step)
        return FileIO(self._path, "a")


class SilentMetrics(MetricsWriter):
    """Stands in for the writer on every rank but the first, and writes nothing."""

    def __init__(self) -> None:
        pass

    def write(self, kind: str, step: int, tokens_seen: int, values: Mapping[str, float | int | str | None]) -> None:
        """Write nothing."""

    def drop_after(self, step: int) -> None:
        """Drop nothing."""

    def close(self) -> None:
        """Close nothing."""


def load_metrics(run_dir: Path | str, kind: str) -> list[dict[str, Any]]:
    """Return all lines of one kind ("train" or "heldout"), in order."""
    lines = (Path(run_dir) / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def measure_memory_bytes(device: torch.device) -> int:
    """Return this rank's peak memory so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a killed run may be cut off
            continue
        is_event = entry["kind"] == "event"  # what happened to a run stays known, whatever it goes back to
        if is_event or (step > 0 and entry["step"] <= step):  # a start from step 0 evaluates it again
            lines.append(line + "\n")
    atomic_write_text(path, "".join(lines))
