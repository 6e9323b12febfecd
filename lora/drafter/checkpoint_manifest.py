"""What a checkpoint of a drafter's training says about itself, and what may change when it is continued."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from model.checkpoint.layout import MANIFEST_NAME
from pretrain.run.run_status import TrainState

FORMAT_VERSION = 2
# Field: what a user who changed it must know.
FIXED = {
    "checkpoint": "the checkpoint (its weights are others)",
    "data": "data, heldout, responses.* or train.sequence_length (the examples are others)",
    "rank": "adapter.rank",
    "alpha": "adapter.alpha",
    "block_size": "block_size",
    "seed": "train.seed",
}


@dataclass(frozen=True)
class FixedSettings:
    """What must stay when a run is continued.

    checkpoint: identity of the weights. data: fingerprint of the examples. num_ranks, zero_stage: the layout.
    """

    checkpoint: str
    data: str
    rank: int
    alpha: float
    block_size: int
    seed: int
    num_ranks: int
    zero_stage: int


def describe_state(state: TrainState, facts: FixedSettings) -> str:
    """Text of a step directory's checkpoint.json."""
    return json.dumps({"format_version": FORMAT_VERSION, **asdict(state), "facts": asdict(facts)}, indent=2) + "\n"


def read_state(step_dir: Path, facts: FixedSettings) -> TrainState:
    """Where `step_dir` continues. Raises: UserError if it is damaged or belongs to a training with other `facts`."""
    path = step_dir / MANIFEST_NAME
    values = read_json_object(path, f"{step_dir} has no {MANIFEST_NAME}: it is no complete checkpoint")
    saved = values.get("facts")
    check_version(step_dir)
    if not isinstance(saved, dict):
        raise UserError(f"{path} is not of this program: choose another run.name")
    _check_facts(saved, asdict(facts), step_dir)
    return TrainState(values["step"], values["tokens_seen"], values["samples_seen"])


def check_version(step_dir: Path) -> None:
    """Raises: UserError if another version of this program wrote `step_dir`. A lost manifest is not its business."""
    path = step_dir / MANIFEST_NAME
    if path.exists() and (found := read_json_object(path, "").get("format_version")) != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {found}, this program reads {FORMAT_VERSION}: choose another run.name, or use "
            "the version of the code that wrote it"
        )


def _check_facts(saved: dict[str, Any], now: dict[str, Any], step_dir: Path) -> None:
    changed = [what for key, what in FIXED.items() if saved.get(key) != now[key]]
    if changed:
        raise UserError(
            f"{step_dir} cannot be continued: {'; '.join(changed)} changed. Give the former settings, or choose "
            "another run.name to train anew."
        )
    layouts = [(values.get("num_ranks"), values.get("zero_stage")) for values in (saved, now)]
    if layouts[0] != layouts[1]:
        then, here = (f"{ranks} processes with zero.stage={stage}" for ranks, stage in layouts)
        raise UserError(
            f"{step_dir} was written by {then}, these are {here}: DeepSpeed continues under the former layout alone. "
            "Give it back, or choose another run.name to train anew."
        )
