"""The folder in which the adapter lands, and the rule that it replaces only what the same run wrote there before."""

import json
import os
import uuid
from pathlib import Path

from conf.schema.drafter import DrafterConfig
from conf.system.atomic import atomic_write_text
from conf.system.errors import UserError
from model.checkpoint.checksums import SUMS_NAME
from model.export.adapter_weights import WEIGHTS_FILE
from model.export.draft_adapter import ADAPTER_FOLDER, CONFIG_FILE, RECORD_FILE

RUN_ID_FILE = "run_id"
ADAPTER_FILES = {CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE}


def output_folder(config: DrafterConfig) -> Path:
    """Return the folder in which the adapter lands."""
    return Path(config.output) if config.output else Path(config.checkpoint, ADAPTER_FOLDER)


def read_run_id(run_dir: Path) -> str | None:
    """Return the id of the run, which stays when the folder is moved; None before its first start."""
    path = run_dir / RUN_ID_FILE
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def draw_run_id(run_dir: Path) -> None:
    """Give the run an id unless it has one; one process calls this."""
    if read_run_id(run_dir) is None:
        atomic_write_text(run_dir / RUN_ID_FILE, uuid.uuid4().hex + "\n")


def check_output(config: DrafterConfig) -> None:
    """Check that the adapter can be written. Raises: UserError if not, or if it would replace anything of others."""
    output, run_dir = output_folder(config), Path(config.run.dir)
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file: give a folder for the adapter")
    parent = next(folder for folder in output.resolve().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"the adapter cannot be written to {output}: {parent} is no folder, or not writable")
    if output.is_dir() and any(output.iterdir()) and not _is_own(output, read_run_id(run_dir)):
        raise UserError(
            f"{output} is not empty and was not written by the run in {run_dir}: it is left alone. Choose another "
            "folder with output=, or move it away"
        )


def is_written(config: DrafterConfig, step: int) -> bool:
    """Return whether this run's adapter of this step is already in its folder."""
    output = output_folder(config)
    return _is_own(output, read_run_id(Path(config.run.dir))) and _read_record(output).get("step") == step


def _is_own(output: Path, run_id: str | None) -> bool:
    if run_id is None or not output.is_dir():
        return False
    names = {path.name for path in output.iterdir()} - {SUMS_NAME}  # adapters written before there were sums have none
    return names == ADAPTER_FILES and _read_record(output).get("run_id") == run_id


def _read_record(output: Path) -> dict:
    try:
        values = json.loads((output / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
