"""The record a run keeps of itself: its resolved configuration, one file per start."""

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from conf.atomic import atomic_write_text
from conf.errors import UserError
from conf.schema import RunConfig
from pretrain.start import StartPoint

CONFIG_FILE = "config.yaml"


def record_run(config: RunConfig, run_dir: Path, start: StartPoint) -> None:
    """Writes config.yaml of this start. Raises UserError if the run folder cannot be written."""
    text = yaml.safe_dump(plain(config), sort_keys=False)
    header = f"# Resolved configuration of the start at step {start.state.step}.\n"
    try:
        atomic_write_text(run_dir / CONFIG_FILE, header + text)
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be written: {error}") from error


def plain(value: Any) -> Any:
    """Dataclasses and enums as dictionaries and strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value.value if isinstance(value, Enum) else value
