"""Sums of checkpoint files over the ranks: each file is written, and later read once to be checked, by one of them."""

import ctypes
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from model.checksums import find_damage, list_files, read_sums, share_of, write_part

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def sum_own_files(directory: Path, rank: int) -> None:
    """Sum the files this rank wrote; megatron-core names them by rank. Raises: OSError."""
    write_part(directory, [name for name in list_files(directory) if name.startswith(f"__{rank}_")], rank)


def summing(write: Callable[..., Any] | None, directory: Path) -> Callable[..., Any] | None:
    """megatron-core's function of a background writer, which then also sums what it wrote, and ends with its rank."""
    return partial(_write_and_sum, write, directory, dist.get_rank()) if write else None


def _write_and_sum(write: Callable[..., Any], directory: Path, rank: int, *arguments: Any, **options: Any) -> None:
    # A writer that outlives its killed rank would write into the folder that the next start saves to.
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    write(*arguments, **options)
    with suppress(OSError):  # whoever completes the checkpoint sums what has no sum yet
        sum_own_files(directory, rank)


def find_damage_over_ranks(step_dir: Path) -> str | None:
    """What is wrong with a step directory, or None; the same on every rank. All ranks together."""
    names: Iterable[str] = read_sums(step_dir) or ()
    mine = share_of(names, dist.get_rank(), dist.get_world_size(), step_dir)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, find_damage(step_dir, mine))
    return next((damage for damage in found if damage), None)
