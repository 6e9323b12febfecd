"""Run folders written by hand."""

import json
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

TOKENS_PER_STEP = 8 * 64
CONFIG = "run: {name: toy}\ntrain: {tokens: 51200, global_batch_size: 8}\ndata: {sequence_length: 64}\n"


class RunFolder:
    """A run of 100 steps, as far as it has come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        (path / "config.yaml").write_text(CONFIG, encoding="utf-8")

    def add(self, kind: str, step: int, **values: Any) -> None:
        line = {"kind": kind, "step": step, "tokens_seen": step * TOKENS_PER_STEP, **values}
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def add_steps(self, steps: Iterable[int], **changes: Any) -> None:
        for step in steps:
            values = {"loss": 5.0 - step / 50, "ar_loss": 4.0, "diffusion_loss": 6.0, "grad_norm": 1.5, "lr": 1e-3}
            speed = {"step_seconds": 2.0, "data_seconds": 0.1, "tokens_per_second": 256.0, "mfu": 0.41}
            work = {"useful_positions": 900, "computed_positions": 1000, "memory_bytes": 1.5e9}
            balance = {"rank_imbalance": 1.02, "undealt_rank_imbalance": 1.3}
            self.add("train", step, **{**values, **speed, **work, **balance, **changes})

    def add_checkpoint(self, step: int, num_bytes: int = 1000) -> None:
        folder = self.path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        for name in ("checkpoint.json", "SHA256SUMS"):
            (folder / name).write_text("{}", encoding="utf-8")
        (folder / "weights.distcp").write_bytes(b"\0" * num_bytes)

    def add_start(self, number: int) -> None:
        folder = self.path / "starts" / f"{number:03d}"
        folder.mkdir(parents=True)
        (folder / "environment.json").write_text("{}", encoding="utf-8")

    def set_status(self, state: str = "running", age: float = 0.0, pid: int | None = None, **changes: Any) -> None:
        """Write the status. age: seconds since the last sign of life, which metrics.jsonl is one of."""
        values = {"state": state, "step": 40, "tokens_seen": 40 * TOKENS_PER_STEP, "time": time.time() - age}
        values |= {"pid": os.getpid() if pid is None else pid, "host": socket.gethostname(), "reason": "", **changes}
        (self.path / "status.json").write_text(json.dumps(values), encoding="utf-8")
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            os.utime(metrics, (time.time() - age, time.time() - age))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Make the folder of a run that has done no step yet."""
    return RunFolder(tmp_path / "toy")
