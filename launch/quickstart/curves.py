"""What the training stages wrote: losses over tokens."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.system.errors import UserError

SMOOTHING = 0.9  # weight of the past in the smoothed training curves


@dataclass
class StageCurves:
    """Lines of metrics.jsonl of one stage, in the order of steps: those of training and those of held-out data."""

    stage: str
    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]


def load_curves(stage: str, run_dir: Path) -> StageCurves:
    """Raises UserError if the run has not written training and held-out losses."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: the {stage} stage has not run. Run the quickstart with --fresh.")
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    curves = StageCurves(stage, *([e for e in entries if e["kind"] == kind] for kind in ("train", "heldout")))
    if not curves.train or not curves.heldout:
        raise UserError(f"{path} lacks training or held-out losses: run the quickstart with --fresh.")
    return curves


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average, corrected for its start as Adam's is."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(average / weight)
    return smoothed
