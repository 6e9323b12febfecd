"""Reads what a run folder says beside its metrics."""

import os
import shutil
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conf.schema import RuntimeConfig
from conf.system.atomic import PARTIAL_SUFFIX
from conf.system.errors import UserError
from model.checkpoint.layout import CHECKPOINTS_FOLDER, list_complete_steps, list_set_aside, step_of
from pretrain.run.run_folder import CONFIG_FILE, METRICS_FILE, STARTS_FOLDER
from pretrain.run.run_status import RunStatus, peek_at_status


@dataclass(frozen=True)
class SavedCheckpoint:
    """Describes the newest complete checkpoint. time: it was completed, in seconds since 1970."""

    step: int
    time: float
    num_bytes: int


@dataclass(frozen=True)
class RunFolderView:
    """Holds what one look at a run folder shows.

    status: None for runs that write none. is_process_gone: status.json names a process of this host that has ended.
    written: when metrics.jsonl was last written, in seconds since 1970; None before the first line.
    total_steps, tokens_per_step: of the whole run, None where the configuration does not say.
    starts: seconds since 1970 at which processes of this run started. is_saving: a checkpoint is being written (or was
    left unfinished). num_set_aside: damaged checkpoints. free_bytes: of the disk.
    """

    run_dir: Path
    title: str
    status: RunStatus | None
    is_process_gone: bool
    written: float | None
    total_steps: int | None
    total_tokens: int | None
    tokens_per_step: int | None
    checkpoint: SavedCheckpoint | None
    is_saving: bool
    num_set_aside: int
    free_bytes: int
    starts: tuple[float, ...] = ()
    straggler_factor: float = RuntimeConfig.straggler_factor


def check_is_run(run_dir: Path) -> None:
    """Raise UserError for a folder that is not a run's."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a folder: give the run folder, such as runs/nld_8b_ar")
    if not any((run_dir / name).exists() for name in (CONFIG_FILE, METRICS_FILE)):
        below = sorted(path.parent.name for path in run_dir.glob(f"*/{CONFIG_FILE}"))
        hint = f"; runs below it: {', '.join(below[:5])}" if below else ""
        raise UserError(f"{run_dir} is not a run folder: it has neither {CONFIG_FILE} nor {METRICS_FILE}{hint}")


def view_run_folder(run_dir: Path) -> RunFolderView:
    """Return what the folder says now. Files that are missing or half written leave things unknown."""
    config, status = _load_config(run_dir / CONFIG_FILE), peek_at_status(run_dir)
    steps, tokens, tokens_per_step = _read_budget(config)
    return RunFolderView(
        run_dir=run_dir,
        title=str(_get(config, "run", "name") or run_dir.name),
        status=status,
        is_process_gone=status is not None and status.host == socket.gethostname() and not _is_alive(status.pid),
        written=_modified(run_dir / METRICS_FILE),
        total_steps=steps,
        total_tokens=tokens,
        tokens_per_step=tokens_per_step,
        checkpoint=_find_checkpoint(run_dir),
        is_saving=any((run_dir / CHECKPOINTS_FOLDER).glob(f"step_*{PARTIAL_SUFFIX}")),
        num_set_aside=len(list_set_aside(run_dir)),
        free_bytes=shutil.disk_usage(run_dir).free,
        starts=_find_starts(run_dir / STARTS_FOLDER),
        straggler_factor=_get(config, "runtime", "straggler_factor") or RuntimeConfig.straggler_factor,
    )


def _load_config(path: Path) -> Any:
    with suppress(OSError, yaml.YAMLError, UnicodeDecodeError):
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    return None


def _get(config: Any, *keys: str) -> Any:
    """Return a value in nested dictionaries, or None."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _read_budget(config: Any) -> tuple[int | None, int | None, int | None]:
    """Return steps and tokens of the whole run, and tokens of a step. A drafter's budget is steps of varying tokens."""
    with suppress(TypeError, ValueError):
        if (steps := _get(config, "train", "steps")) is not None:
            return int(steps), None, None
        per_step = int(_get(config, "train", "global_batch_size")) * int(_get(config, "data", "sequence_length"))
        tokens = int(float(_get(config, "train", "tokens")))
        steps = max(1, tokens // per_step)
        return steps, steps * per_step, per_step
    return None, None, None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _modified(path: Path) -> float | None:
    with suppress(OSError):
        return path.stat().st_mtime
    return None


def _find_checkpoint(run_dir: Path) -> SavedCheckpoint | None:
    """Return the newest one; one that is deleted while it is looked at has a newer one, next time."""
    with suppress(OSError):
        for step_dir in reversed(list_complete_steps(run_dir)):
            files = [path.stat() for path in step_dir.rglob("*") if path.is_file()]
            completed = max(found.st_mtime for found in files)
            return SavedCheckpoint(step_of(step_dir), completed, sum(found.st_size for found in files))
    return None


def _find_starts(folder: Path) -> tuple[float, ...]:
    """Return the times of all starts in order: when each wrote its environment.json."""
    times = (_modified(path) for path in folder.glob("[0-9]*/environment.json"))
    return tuple(sorted(time for time in times if time is not None))
