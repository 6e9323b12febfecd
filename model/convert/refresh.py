"""Brings an export that an earlier version wrote up to date: code, tokenizer_config.json, SHA256SUMS; weights stay.

The new folder is put together beside the old one, with hard links to files that stay, and takes its name at the end.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.system.atomic import atomic_directory, atomic_write_text
from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from model.checkpoint.checksums import find_changed, hash_files, read_sums, save_sums
from model.convert import hf_target
from model.convert.nld_config import AUTO_MAP, read_transformers_version
from model.export.draft_adapter import ADAPTER_FOLDER, RECORD_FILE, identify_checkpoint
from model.export.shipped_code import CONFIG_NAME, find_needed_files, list_code_files

VERSION_KEY = "transformers_version"


@dataclass(frozen=True)
class Refreshed:
    """The files that a refresh changed, by name: written anew or for the first time, and removed."""

    written: list[str]
    removed: list[str]


def refresh_export(directory: Path) -> Refreshed:
    """Bring the export in `directory` up to date; it is left as it is when nothing differs.

    Raises:
        UserError: it is no export of this project, holds links, or differs from its SHA256SUMS.
        OSError: it cannot be written; it is then as before.
    """
    config = _read_config(directory)
    _refuse_links(directory)
    _refuse_damage(directory)
    contents = _build_contents(directory, config)
    written = sorted(name for name, text in contents.items() if _read(directory / name) != text)
    removed = sorted(_find_code(directory) - contents.keys())
    if not written and not removed:
        return Refreshed([], [])
    with atomic_directory(directory, replace=True) as partial:
        shutil.copytree(directory, partial, copy_function=_link, dirs_exist_ok=True)
        for name in removed:
            (partial / name).unlink()
        for name in written:  # under another name first: what is written here must not reach the linked old file
            atomic_write_text(partial / name, contents[name])
        _renew_sums(partial, written, removed)
        _keep_adapter(directory, partial)
    return Refreshed(written, removed)


def _read_config(directory: Path) -> dict[str, Any]:
    """Read config.json. Raises: UserError unless its auto_map names the classes that this project ships."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: give the folder of an export")
    path = directory / CONFIG_NAME
    config = read_json_object(path, f"{directory} is not an export: it has no {CONFIG_NAME}")
    if config.get("auto_map") != AUTO_MAP:
        raise UserError(
            f"{directory} is not an export of this project: auto_map in {CONFIG_NAME} names other classes. To get one, "
            "import it and export the result (python -m model.convert --from ... --to ...)"
        )
    return config


def _refuse_links(directory: Path) -> None:
    if links := sorted(path.name for path in directory.rglob("*") if path.is_symlink()):
        raise UserError(
            f"{directory} holds links ({links[0]}), as in the cache of a hub: copy the folder (cp -rL) and refresh the "
            "copy"
        )


def _refuse_damage(directory: Path) -> None:
    """Refuse files that are not those of SHA256SUMS, which a refresh would sign. Raises: UserError."""
    sums = read_sums(directory)
    if sums is None:
        return
    missing = next((name for name in sums if not (directory / name).is_file()), None)
    if problem := f"{missing} is missing" if missing else find_changed(directory, sums, sums):
        raise UserError(f"{directory} is damaged: {problem}. Fetch or export it again")


def _build_contents(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Build the files, other than weights, of an export of today; config.json keeps every value."""
    contents = {path.name: path.read_text(encoding="utf-8") for path in list_code_files()}
    tokenizer = hf_target.read_tokenizer_config(directory)
    portable = hf_target.build_portable_tokenizer_config(tokenizer)
    if portable != tokenizer:
        contents[hf_target.TOKENIZER_CONFIG_NAME] = hf_target.format_json(portable)
    if VERSION_KEY not in config:
        contents[CONFIG_NAME] = hf_target.format_json(config | {VERSION_KEY: read_transformers_version()})
    return contents


def _find_code(directory: Path) -> set[str]:
    """Return the Python files that loading uses today; others are somebody else's and stay."""
    first = {f"{target.partition('.')[0]}.py" for target in AUTO_MAP.values()}
    try:
        return find_needed_files(directory, first)[0]
    except SyntaxError as error:
        raise UserError(f"{directory}: {error.filename} is not Python: {error.msg}. Export it again") from None


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _link(source: str, target: str) -> None:
    """Link `target` to `source`; copy it on a file system without hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _renew_sums(folder: Path, written: list[str], removed: list[str]) -> None:
    """Sum the written files again. A folder without sums stays without: nobody knows what it should hold."""
    sums = read_sums(folder)
    if sums is not None:
        others = {name: value for name, value in sums.items() if name not in removed}
        save_sums(folder, others | hash_files(folder, written))


def _keep_adapter(directory: Path, partial: Path) -> None:
    """Let the draft adapter's record name the export under its new identity, which includes config.json."""
    record_path = partial / ADAPTER_FOLDER / RECORD_FILE
    if not record_path.is_file():
        return
    record = read_json_object(record_path, f"{record_path} has disappeared")
    if record.get("checkpoint") == identify_checkpoint(directory):
        record["checkpoint"] = identify_checkpoint(partial)
        atomic_write_text(record_path, json.dumps(record, indent=2) + "\n")
        _renew_sums(record_path.parent, [RECORD_FILE], [])
