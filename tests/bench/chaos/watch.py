"""Observe, from its run folder, a start that is under way."""

import json
import time
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from conf.system.atomic import PARTIAL_SUFFIX
from model.checkpoint.layout import CHECKPOINTS_FOLDER, find_newest_complete, step_of
from pretrain.run.metrics import METRICS_FILE
from pretrain.run.start_record import STARTS_FOLDER
from tests.bench.chaos.job import EVALUATE_EVERY


class Phase(Enum):
    """Name what a start was doing."""

    start = "start"
    load = "load"
    step = "step"
    save = "save"
    asynchronous_save = "asynchronous_save"
    evaluation = "evaluation"


@dataclass
class Watch:
    """A look at the run folder of one start, made just before it."""

    run_dir: Path
    asynchronous: bool
    began: float = field(default_factory=time.time)
    newest: Path | None = field(init=False)
    _starts: int = field(init=False)
    _metrics: int = field(init=False)
    _restores: int = field(init=False)  # lines of earlier starts that this one keeps

    def __post_init__(self) -> None:
        self.newest = find_newest_complete(self.run_dir)
        self._starts, self._metrics = self._count_starts(), self._metrics_inode()
        lines = read_metrics(self.run_dir) if self._metrics and self.newest else []
        self._restores = sum(line["kind"] == "restore" and line["step"] <= self.first_step for line in lines)

    @property
    def first_step(self) -> int:
        """Return the step of the checkpoint that this start must continue; 0 without one."""
        return step_of(self.newest) if self.newest else 0

    @property
    def is_loading(self) -> bool:
        """Return whether this start has left its record, which is done before model and checkpoint are read."""
        return self._count_starts() > self._starts

    @property
    def trained(self) -> list[int]:
        """Steps this start has written down."""
        return [line["step"] for line in self._lines() if line["kind"] == "train"]

    @property
    def restored(self) -> list[int]:
        """Steps whose checkpoints this start says it has read."""
        return [line["step"] for line in self._lines(0) if line["kind"] == "restore"][self._restores :]

    @property
    def saving(self) -> int | None:
        """Step whose checkpoint is being written, or None."""
        for path in (self.run_dir / CHECKPOINTS_FOLDER).glob(f"step_????????{PARTIAL_SUFFIX}"):
            try:
                if path.stat().st_ctime > self.began and self.trained:
                    return int(path.name.removesuffix(PARTIAL_SUFFIX).removeprefix("step_"))
            except OSError:
                continue
        return None

    @property
    def is_evaluating(self) -> bool:
        """Return whether an evaluation is due that is not written down; the first one comes before any step."""
        lines = [line for line in self._lines(self.first_step) if line["kind"] in ("train", "heldout", "data")]
        if not lines or (self.newest and not self.restored):
            return False
        last = lines[-1]
        if last["kind"] == "data":
            return self.first_step == 0
        return last["kind"] == "train" and last["step"] % EVALUATE_EVERY == 0

    def observe(self) -> Phase:
        """Return what the start is doing now."""
        if not self.is_loading:
            return Phase.start
        if self.is_evaluating:
            return Phase.evaluation
        if not self.trained:
            return Phase.load
        if self.saving is not None:
            return Phase.asynchronous_save if self.asynchronous else Phase.save
        return Phase.step

    def _lines(self, least: int | None = None) -> list[dict[str, Any]]:
        """Read the metrics this start has written: those after its checkpoint's step, or from step `least` on."""
        if not self._is_ours():
            return []
        first = self.first_step + 1 if least is None else least
        return [line for line in read_metrics(self.run_dir) if line["step"] >= first]

    def _is_ours(self) -> bool:
        """Return whether this start wrote the metrics file: it is replaced once a start has decided where it begins."""
        return self.is_loading and self._metrics_inode() not in (0, self._metrics)

    def _metrics_inode(self) -> int:
        path = self.run_dir / METRICS_FILE
        return path.stat().st_ino if path.exists() else 0

    def _count_starts(self) -> int:
        return len(list((self.run_dir / STARTS_FOLDER).glob("[0-9][0-9][0-9]")))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl, without one that is just being written."""
    found = []
    for line in (run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
