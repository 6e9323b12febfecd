"""Check the run itself: its settings, its folder, the disk space it needs, and what it would start from."""

import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from conf.rules.layout import num_microbatches
from conf.rules.run import check_rules
from conf.system.lock import try_lock
from launch.preflight.runner import Finding, TrainingJob
from model.checkpoint.layout import list_complete_steps
from pretrain.costs import compute_checkpoint_bytes
from pretrain.run.run_folder import LOCK_FILE
from pretrain.run.run_status import STATUS_FILE, RunPhase, peek_at_status

PROBE_BYTES = 4096
# A live run renews its status as it steps; one older than this has probably ended without a last word.
LIVE_SECONDS = 120.0
TIGHT = 1.2  # times the space needed; below it, other users of the disk may take what is left


def check_configuration(job: TrainingJob) -> Iterator[Finding]:
    """Check the rules between settings for the job's number of ranks; all broken ones come in one message."""
    config, world_size = job.config, job.world_size
    check_rules(config, world_size)
    layout, microbatches = config.parallel.describe(world_size), num_microbatches(config, world_size)
    yield Finding.ok(
        f"world size {world_size} ({job.nodes} x {job.gpus_per_node}): {layout}; {config.num_steps} steps of "
        f"{config.tokens_per_step} tokens, {microbatches} microbatches of {config.train.micro_batch_size} x "
        f"{config.data.sequence_length} per rank"
    )


def check_run_folder(job: TrainingJob) -> Iterator[Finding]:
    """Check that no other run uses the folder, and that it is writable: a probe file is written, synced and deleted."""
    run_dir = job.run_dir
    owner = _find_owner(run_dir / LOCK_FILE)
    if owner is not None:
        yield Finding.failed(
            f"{run_dir} is in use by another run ({owner}): wait for it, stop it, or choose another run.name"
        )
    else:
        yield from _find_signs_of_life(run_dir)
    folder = _nearest_existing(run_dir)
    try:
        _write_probe(folder)
    except OSError as error:
        yield Finding.failed(f"{folder} cannot be written ({error}): fix it, or choose another run.root")
        return
    if owner is None:
        yield Finding.ok(
            f"{run_dir} is free and writable" if run_dir.exists() else f"{run_dir} can be created in {folder}"
        )


def _find_owner(lock: Path) -> str | None:
    """Return what the lock file says about the live process that holds it, or None if nobody does."""
    if not lock.exists():
        return None
    with lock.open("r+", encoding="utf-8") as file:
        return None if try_lock(file) else file.read().strip() or "owner unknown"


def _find_signs_of_life(run_dir: Path) -> Iterator[Finding]:
    """Look for a run on another machine by its status, for file systems that have no locks."""
    status = peek_at_status(run_dir)
    if status is None or status.state != RunPhase.running.value or status.host == socket.gethostname():
        return
    age = time.time() - status.time
    if age < LIVE_SECONDS:
        yield Finding.warning(
            f"{run_dir / STATUS_FILE} was renewed {age:.0f} s ago by a run on {status.host}, although nobody holds the "
            "lock (some network file systems have none): make sure that run has ended"
        )


def _write_probe(folder: Path) -> None:
    """Write a small file, sync it to disk and delete it. Raises OSError."""
    probe = folder / f".preflight_{socket.gethostname()}_{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(os.urandom(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def check_disk_space(job: TrainingJob) -> Iterator[Finding]:
    """Check for room for `checkpoint.keep` checkpoints and the one being written, less those that exist already."""
    config = job.config
    size = compute_checkpoint_bytes(config.model, config.precision.dtype)
    existing = min(len(list_complete_steps(config.run.dir)), config.checkpoint.keep)
    needed = (config.checkpoint.keep + 1 - existing) * size
    folder = _nearest_existing(job.run_dir)
    free = shutil.disk_usage(folder).free
    detail = (
        f"{config.checkpoint.keep} + 1 checkpoints of {_gigabytes(size)}"
        f"{f', {existing} of them saved already' if existing else ''}: "
        f"{_gigabytes(needed)} of {_gigabytes(free)} free in {folder}"
    )
    if free < needed:
        yield Finding.failed(
            f"{detail}: free {_gigabytes(needed - free)}, lower checkpoint.keep or choose another run.root"
        )
    elif free < TIGHT * needed:
        yield Finding.warning(f"{detail}: little is left for anything else (quotas are not checked)")
    else:
        yield Finding.ok(detail)


def _nearest_existing(path: Path) -> Path:
    """Return `path`, or its closest parent that exists."""
    path = path.absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def check_start(job: TrainingJob) -> Iterator[Finding]:
    """Check what the run would start from, by the trainer's own decision and with its messages.

    It finds another model, tokenizer, stage or data, and damaged checkpoints.
    """
    from pretrain.resume.start_point import find_start  # imports torch

    config = job.config
    assert job.data is not None
    start = job.start = find_start(config, job.data)
    if start.step_dir is not None:
        left = int(config.train.tokens) - start.state.tokens_seen
        where = f"resumes {start.step_dir} at step {start.state.step}"
        if left < config.tokens_per_step:
            yield Finding.warning(
                f"{where}, where the run is complete: raise train.tokens to continue it, or choose another run.name"
            )
        else:
            yield Finding.ok(
                f"{where}; {left // config.tokens_per_step} steps are left; checksums are compared at the start"
            )
        for line in start.describe_changes():
            yield Finding.ok(line)
    elif start.weights is not None:
        yield Finding.ok(f"weights from {start.weights}")
    else:
        yield Finding.ok("fresh weights (no init_from, no checkpoint in the run folder)")
