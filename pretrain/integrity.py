"""Sums of checkpoint files over the ranks: each file is written, and later read once to be checked, by one of them."""

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from conf.errors import UserError
from model.checkpoint_layout import find_newest_complete, list_set_aside, set_aside
from model.checksums import find_damage, list_files, read_sums, share_of, write_part
from pretrain.helper_processes import end_with_parent
from pretrain.process_group import decide_on_first_rank, run_on_first_rank

logger = logging.getLogger(__name__)


def sum_own_files(directory: Path, rank: int) -> None:
    """Sum the files this rank wrote; megatron-core names them by rank. Raises: OSError."""
    write_part(directory, [name for name in list_files(directory) if name.startswith(f"__{rank}_")], rank)


def summing(write: Callable[..., Any] | None, directory: Path) -> Callable[..., Any] | None:
    """megatron-core's function of a background writer, which then also sums what it wrote, and ends with its rank."""
    return partial(_write_and_sum, write, directory, dist.get_rank(), os.getpid()) if write else None


def _write_and_sum(
    write: Callable[..., Any], directory: Path, rank: int, parent: int, *arguments: Any, **options: Any
) -> None:
    end_with_parent(parent)
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


def find_intact_checkpoint(run_dir: Path, check: Callable[[Path], None] = lambda step_dir: None) -> Path | None:
    """The run's newest checkpoint with its files as written; damaged ones are set aside. All ranks together.

    check: called on rank 0 with a checkpoint before its files are read; it may raise UserError.
    Raises: UserError if there were checkpoints and none is left, which must not look like a run that begins.
    """
    while (newest := decide_on_first_rank(lambda: find_newest_complete(run_dir))) is not None:
        run_on_first_rank(lambda newest=newest: check(newest))
        damage = find_damage_over_ranks(newest)
        if damage is None:
            return newest
        logger.warning(f"{newest} is damaged ({damage}): it is set aside, the checkpoint before it is used")
        run_on_first_rank(lambda newest=newest: set_aside(newest))
    run_on_first_rank(lambda: _check_none_set_aside(run_dir))
    return None


def _check_none_set_aside(run_dir: Path) -> None:
    if aside := list_set_aside(run_dir):
        raise UserError(
            f"no checkpoint of {run_dir} is left that could be read ({len(aside)} set aside, the newest as "
            f"{aside[-1]}): put back a copy of one, or choose another run.name to start anew."
        )
