"""Whether the disk holds what the run will keep."""

import shutil
from collections.abc import Iterator

from launch.preflight.findings import Finding, failed, ok, warning
from launch.preflight.subject import Subject, nearest_existing
from model.checkpoint.layout import list_complete_steps
from pretrain.checkpointing.size import compute_checkpoint_bytes

TIGHT = 1.2  # times what is needed; below it, other users of the disk may take the rest


def check_space(subject: Subject) -> Iterator[Finding]:
    """checkpoint.keep complete ones and the one being written, less those that are there already."""
    config = subject.config
    size = compute_checkpoint_bytes(config.model, config.precision.dtype)
    there = min(len(list_complete_steps(config.run.dir)), config.checkpoint.keep)
    needed = (config.checkpoint.keep + 1 - there) * size
    folder = nearest_existing(subject.run_dir)
    free = shutil.disk_usage(folder).free
    detail = (
        f"{config.checkpoint.keep} + 1 checkpoints of {_gigabytes(size)}"
        f"{f', {there} of them there' if there else ''}: {_gigabytes(needed)} of {_gigabytes(free)} free in {folder}"
    )
    if free < needed:
        yield failed(f"{detail}: free {_gigabytes(needed - free)}, lower checkpoint.keep or choose another run.root")
    elif free < TIGHT * needed:
        yield warning(f"{detail}: little is left for anything else (quotas are not seen here)")
    else:
        yield ok(detail)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
