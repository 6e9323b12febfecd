"""checkpoint.json of a drafter's step directory: what a run continues from, and what must stay the same until then."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from model.checkpoint.layout import MANIFEST_NAME
from pretrain.run.run_status import TrainState

DRAFTER_FORMAT_VERSION = 2
FIXED_KEY = "facts"  # the name of FixedSettings in checkpoint.json
# Field: the settings that a user may have changed.
EXPLANATIONS = {
    "checkpoint": "the checkpoint (it has other weights)",
    "data": "data, heldout, responses.* or train.sequence_length (they make other examples)",
    "rank": "adapter.rank",
    "alpha": "adapter.alpha",
    "block_size": "block_size",
    "seed": "train.seed",
}


@dataclass(frozen=True)
class FixedSettings:
    """The settings that must be the same when a run is continued.

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


def describe_state(state: TrainState, fixed: FixedSettings) -> str:
    """Return the text of a step directory's checkpoint.json."""
    content = {"format_version": DRAFTER_FORMAT_VERSION, **asdict(state), FIXED_KEY: asdict(fixed)}
    return json.dumps(content, indent=2) + "\n"


def read_state(step_dir: Path, fixed: FixedSettings) -> TrainState:
    """Return the state that `step_dir` continues from.

    Raises: UserError if it is damaged or belongs to a training with other `fixed` settings.
    """
    path = step_dir / MANIFEST_NAME
    values = read_json_object(path, f"{step_dir} has no {MANIFEST_NAME}: it is no complete checkpoint")
    saved = values.get(FIXED_KEY)
    check_version(step_dir)
    if not isinstance(saved, dict):
        raise UserError(f"{path} was written by another program: choose another run.name")
    _check_fixed(saved, asdict(fixed), step_dir)
    return TrainState(values["step"], values["tokens_seen"], values["samples_seen"])


def check_version(step_dir: Path) -> None:
    """Raise UserError if another version of this program wrote `step_dir`; ignore a missing manifest."""
    path = step_dir / MANIFEST_NAME
    if path.exists() and (found := read_json_object(path, "").get("format_version")) != DRAFTER_FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {found}, this program reads {DRAFTER_FORMAT_VERSION}: choose another run.name, "
            "or use the version of the code that wrote it"
        )


def _check_fixed(saved: dict[str, Any], now: dict[str, Any], step_dir: Path) -> None:
    changed = [what for key, what in EXPLANATIONS.items() if saved.get(key) != now[key]]
    if changed:
        raise UserError(
            f"{step_dir} cannot be continued: {'; '.join(changed)} changed. Give the former settings, or choose "
            "another run.name to train anew."
        )
    layouts = [(values.get("num_ranks"), values.get("zero_stage")) for values in (saved, now)]
    if layouts[0] != layouts[1]:
        then, here = (f"{ranks} processes with zero.stage={stage}" for ranks, stage in layouts)
        raise UserError(
            f"{step_dir} was written by {then}, but this run has {here}. DeepSpeed continues only under the former "
            "layout: use it again, or choose another run.name to train anew."
        )
