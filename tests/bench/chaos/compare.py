"""Two runs compared: all tensors of their last checkpoints, what they say they have seen, and their loss curves."""

import warnings
from pathlib import Path
from typing import Any

import torch

from model.checkpoint.layout import find_newest_complete, load_checkpoint_manifest
from tests.bench.chaos.watch import read_metrics
from tests.distributed.test_checkpoint import load_tensors

KEYS = ("step", "tokens_seen", "loss", "ar_loss", "diffusion_loss", "masking_ratio", "grad_norm", "lr")
FIELDS = ("step", "tokens_seen", "samples_seen", "data_position", "guard")


def list_differences(run_dir: Path, other_dir: Path) -> list[str]:
    """List the names of what is not bit for bit the same in the newest checkpoints of two runs."""
    newest, other = find_newest_complete(run_dir), find_newest_complete(other_dir)
    if newest is None or other is None:
        return ["a run has no checkpoint"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group here
        tensors, others = load_tensors(newest), load_tensors(other)
    differing = [key for key in tensors.keys() & others.keys() if not _same_bits(tensors[key], others[key])]
    manifest, its = load_checkpoint_manifest(newest), load_checkpoint_manifest(other)
    names = [name for name in FIELDS if getattr(manifest, name) != getattr(its, name)]
    return sorted([*differing, *(tensors.keys() ^ others.keys()), *names])


def load_curve(run_dir: Path) -> list[tuple[Any, ...]]:
    """Load everything of steps and evaluations that must be reproduced, as written."""
    lines = read_metrics(run_dir)
    train = [("train", *(line[key] for key in KEYS)) for line in lines if line["kind"] == "train"]
    heldout = [("heldout", line["step"], line["loss"], line["ar_loss"]) for line in lines if line["kind"] == "heldout"]
    return train + heldout


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
