"""Locks a run folder and records the resolved configuration in it."""

import dataclasses
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from conf.system.atomic import atomic_write_text
from conf.system.errors import UserError
from conf.system.lock import try_lock

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
STARTS_FOLDER = "starts"
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


def record_run(config: Any, run_dir: Path, step: int) -> None:
    """Write config.yaml of the start at `step`. Raises: UserError if the run folder cannot be written."""
    header = f"# Resolved configuration of the start at step {step}.\n"
    try:
        atomic_write_text(run_dir / CONFIG_FILE, header + write_out(config))
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be written: {error}") from error


@contextmanager
def lock_run_folder(run_dir: Path) -> Iterator[None]:
    """Hold the run folder for this process; the system lets go of it however the process ends.

    Raises UserError if another live process holds it (naming it) or the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be written: {error}") from error
    with file:
        if not try_lock(file):
            file.seek(0)
            raise UserError(
                f"{run_dir} is in use by another run ({_describe_owner(file.read())}): wait for it, stop it, or choose "
                "another run.name."
            )
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():{TIME_FORMAT}}\n")
            file.flush()
        except OSError as error:
            raise UserError(f"run.dir={run_dir} cannot be written: {error}") from error
        yield


def _describe_owner(text: str) -> str:
    """Return what the owner of a lock wrote, and how long ago."""
    text = text.strip() or "which is just starting"
    with suppress(ValueError):
        since = datetime.strptime(text.rpartition(" since ")[2], TIME_FORMAT)
        minutes = (datetime.now() - since).total_seconds() / 60
        text += f", {minutes:.0f} minutes ago" if minutes < 120 else f", {minutes / 60:.0f} hours ago"
    return text


def write_out(config: Any) -> str:
    """Return a dataclass as text of a config.yaml."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def plain(value: Any) -> Any:
    """Return dataclasses and enums, also inside dictionaries and lists, as dictionaries and strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value
