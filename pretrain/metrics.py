"""What a run writes down: one JSON object per line in metrics.jsonl, TensorBoard events, lines on the console."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import torch

from conf.atomic import atomic_write_text

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Rank 0's writer. Lines of steps after `step` (of a run that was killed later) are dropped first; all at 0."""

    def __init__(self, run_dir: Path, step: int, tensorboard: bool) -> None:
        self._path = run_dir / METRICS_FILE
        _drop_lines_after(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = _open_tensorboard(run_dir, step) if tensorboard else None

    def write(self, kind: str, step: int, tokens_seen: int, values: dict[str, float | int | None]) -> None:
        """Appends one line {"kind", "step", "tokens_seen", **values} and the values as TensorBoard scalars."""
        line = {"kind": kind, "step": step, "tokens_seen": tokens_seen, **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                if value is not None:
                    self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Brings everything to disk."""
        os.fsync(self._file.fileno())
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def load_metrics(run_dir: Path | str, kind: str) -> list[dict[str, Any]]:
    """All lines of one kind ("train" or "heldout"), in order."""
    lines = (Path(run_dir) / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def measure_memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a killed run may be cut off
            continue
        if step > 0 and entry["step"] <= step:  # a start from step 0 evaluates it again
            kept.append(line + "\n")
    atomic_write_text(path, "".join(kept))


def _open_tensorboard(run_dir: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
