"""Checksums of a checkpoint, compared before it is read: every rank reads its share of the files once."""

import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from conf.system.errors import UserError
from model.checkpoint.checksums import SUMS_NAME, find_changed, find_wrong_names, read_sums, share_of
from model.checkpoint.layout import find_newest_complete, list_set_aside, set_aside
from pretrain.run.process_group import decide_on_first_rank, gather_over_ranks, run_on_first_rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Listing:
    """Holds what rank 0 saw of a step directory. sizes: bytes by file name."""

    damage: str | None
    sums: dict[str, str]
    sizes: dict[str, int]


def find_damage_over_ranks(step_dir: Path) -> str | None:
    """Return what is wrong with a step directory, or None; the same on every rank. All ranks call this together.

    Raises: UserError if a rank cannot read a file that is there: that says something about the disk or the host, and
    nothing about the checkpoint.
    """
    listing = decide_on_first_rank(lambda: _list(step_dir))
    if listing.damage:
        return listing.damage
    mine = share_of(listing.sizes, dist.get_rank(), dist.get_world_size())
    found = gather_over_ranks(lambda: _find_changed(step_dir, listing.sums, mine))
    return next((damage for damage in found if damage), None)


def _find_changed(step_dir: Path, sums: dict[str, str], names: list[str]) -> str | None:
    """Call find_changed, a second time if reading failed. Raises: UserError instead of OSError."""
    with suppress(OSError):
        return find_changed(step_dir, sums, names)
    try:
        return find_changed(step_dir, sums, names)
    except OSError as error:
        raise UserError(
            f"{step_dir} cannot be read by rank {dist.get_rank()} on {socket.gethostname()}: {error}. Nothing was "
            "changed; repair the disk or leave out the host, then give the same command again."
        ) from error


def _list(step_dir: Path) -> _Listing:
    damage, sums = find_wrong_names(step_dir), read_sums(step_dir) or {}
    sizes = {} if damage else {name: (step_dir / name).stat().st_size for name in sums}
    return _Listing(damage, sums, sizes)


def find_intact_checkpoint(
    run_dir: Path,
    check_version: Callable[[Path], object] = lambda step_dir: None,
    say: Callable[[str], None] = logger.warning,
) -> Path | None:
    """Return the run's newest checkpoint whose files are as they were written, or None for a run without checkpoints.

    Damaged ones are set aside. All ranks call this together.

    Args:
        run_dir: The run folder.
        check_version: Called on rank 0 with a checkpoint without checksums, which another version of the program may
            have written; raises UserError then.
        say: Called on rank 0 with one sentence on every checkpoint that is set aside.

    Raises:
        UserError: If there were checkpoints and none is left, which must not look like a run that begins; or as
            find_damage_over_ranks.
    """
    while (newest := decide_on_first_rank(lambda: find_newest_complete(run_dir))) is not None:
        run_on_first_rank(lambda newest=newest: (newest / SUMS_NAME).exists() or check_version(newest))
        damage = find_damage_over_ranks(newest)
        if damage is None:
            return newest
        message = f"{newest} is damaged ({damage}): it is set aside, the checkpoint before it is used"
        run_on_first_rank(lambda newest=newest, message=message: _set_aside(newest, message, say))
    run_on_first_rank(lambda: _check_none_set_aside(run_dir))
    return None


def _set_aside(step_dir: Path, message: str, say: Callable[[str], None]) -> None:
    say(message)
    set_aside(step_dir)


def _check_none_set_aside(run_dir: Path) -> None:
    if aside := list_set_aside(run_dir):
        raise UserError(
            f"no checkpoint of {run_dir} is left that could be read ({len(aside)} set aside, the newest as "
            f"{aside[-1]}): put back a copy of one, or choose another run.name to start anew."
        )
