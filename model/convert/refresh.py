"""Brings an export that an earlier version wrote up to date: code, configuration, SHA256SUMS; weights stay.

The new folder is put together beside the old one, with hard links to files that stay, and takes its name at the end.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.system.atomic import atomic_directory, atomic_write_bytes
from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from conf.system.lock import locking_directory
from model.checkpoint.checksums import SUMS_NAME, find_changed, hash_files, read_sums, save_sums
from model.convert import hf_target
from model.convert.generation import read_generation_config
from model.convert.nld_config import ABSENT, build_generation_config, read_transformers_version
from model.convert.processor_config import build_processor_config
from model.convert.vision_config import read_vision_config
from model.export.draft_adapter import ADAPTER_FOLDER
from model.export.shipped_code import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    PROCESSOR_CONFIG_NAME,
    VERSION_KEY,
    VLM_TYPE,
    find_model_type,
    find_needed_files,
    list_code_files,
    list_first_files,
)


@dataclass(frozen=True)
class Refreshed:
    """The files that a refresh changed, by name: written anew or for the first time, and removed."""

    written: list[str]
    removed: list[str]


def refresh_export(directory: Path) -> Refreshed:
    """Bring the export in `directory` up to date; it is left as it is when nothing differs.

    Raises:
        UserError: it is no export of this project, is being refreshed, or holds what is damaged or is no plain file.
        OSError: it cannot be written; it is then as before.
    """
    directory = directory.resolve()  # a link to an export stays one
    config = _read_config(directory)
    _refuse_read_only(directory)
    with locking_directory(directory) as is_alone:
        if not is_alone:
            raise UserError(f"{directory} is being refreshed by another process: let one do it")
        _refuse_special_files(directory)
        for folder in (directory, directory / ADAPTER_FOLDER):
            _refuse_damage(folder)
        contents = _build_contents(directory, config)
        written = sorted(name for name, content in contents.items() if _read(directory / name) != content)
        removed = sorted(_find_code(directory, config) - contents.keys())
        if written or removed:
            _replace(directory, {name: contents[name] for name in written}, removed)
        return Refreshed(written, removed)


def _replace(directory: Path, contents: dict[str, bytes], removed: list[str]) -> None:
    """Exchange an export for one with other contents of some files and without others."""
    with atomic_directory(directory, replace=True) as partial:
        shutil.copytree(directory, partial, copy_function=_link, dirs_exist_ok=True)
        for name in removed:
            (partial / name).unlink()
        for name, content in contents.items():  # replaced, not written to: that would reach the linked old file
            atomic_write_bytes(partial / name, content)
        sums = read_sums(partial)
        if sums is not None:  # without sums it stays so: nobody knows what it should hold
            others = {name: value for name, value in sums.items() if name not in removed}
            save_sums(partial, others | hash_files(partial, contents))


def _refuse_read_only(directory: Path) -> None:
    if read_only := next((path for path in _walk_folders(directory) if not os.access(path, os.W_OK)), None):
        raise UserError(f"{read_only} cannot be written: refresh a copy of the export, or change its permissions")


def _walk_folders(directory: Path) -> Iterator[Path]:
    yield directory.parent
    yield from (Path(folder) for folder, _, _ in os.walk(directory))


def _read_config(directory: Path) -> dict[str, Any]:
    """Read config.json. Raises: UserError unless its auto_map names the classes that this project ships."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: give the folder of an export")
    if os.path.ismount(directory):
        raise UserError(f"{directory} is a mount point, whose name cannot be exchanged: refresh a copy of it")
    path = directory / CONFIG_NAME
    config = read_json_object(path, f"{directory} is not an export: it has no {CONFIG_NAME}")
    if find_model_type(config) is None:
        raise UserError(
            f"{directory} is not an export of this project: auto_map in {CONFIG_NAME} names other classes. To get one, "
            "import it and export the result (python -m model.convert --from ... --to ...)"
        )
    return config


def _refuse_special_files(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise UserError(
                f"{path} is a link, as in the cache of a hub: copy the folder (cp -rL) and refresh the copy"
            )
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is not a regular file: remove it, whoever reads it may wait forever")


def _refuse_damage(folder: Path) -> None:
    """Refuse files that are not those of SHA256SUMS, which a refresh would sign. Raises: UserError."""
    if not (folder / SUMS_NAME).is_file():
        return
    sums = read_sums(folder)
    if sums is None:
        raise UserError(f"{folder / SUMS_NAME} is damaged: fetch or export the checkpoint again")
    missing = next((name for name in sums if not (folder / name).is_file()), None)
    if problem := f"{missing} is missing" if missing else find_changed(folder, sums, sums):
        raise UserError(f"{folder} is damaged: {problem}. Fetch or export it again")


def _build_contents(directory: Path, config: dict[str, Any]) -> dict[str, bytes]:
    """Build the files, other than weights, of an export of today; configurations keep every value that they have."""
    contents = {path.name: path.read_bytes() for path in list_code_files(config["model_type"])}
    tokenizer = hf_target.read_tokenizer_config(directory)
    portable = hf_target.build_portable_tokenizer_config(tokenizer)
    if portable != tokenizer:
        contents[hf_target.TOKENIZER_CONFIG_NAME] = hf_target.format_json(portable).encode()
    # Written by another program, config.json may be laid out otherwise, and would get another identity.
    if _read(directory / CONFIG_NAME) == hf_target.format_json(config).encode():
        complete = {VERSION_KEY: read_transformers_version()} | ABSENT | config
        contents[CONFIG_NAME] = hf_target.format_json(complete).encode()
    generation = read_generation_config(directory)
    if (complete := build_generation_config(config, {}) | generation) != generation:
        contents[GENERATION_CONFIG_NAME] = hf_target.format_json(complete).encode()
    processor = directory / PROCESSOR_CONFIG_NAME
    if config["model_type"] == VLM_TYPE and not processor.is_file():
        vision = read_vision_config(config, directory / CONFIG_NAME)
        contents[processor.name] = hf_target.format_json(build_processor_config(vision, {})).encode()
    return contents


def _find_code(directory: Path, config: dict[str, Any]) -> set[str]:
    """Return the Python files that loading uses today; others are somebody else's and stay."""
    try:
        return find_needed_files(directory, list_first_files(config["model_type"]))[0]
    except SyntaxError as error:
        raise UserError(f"{directory}: {error.filename} is not Python: {error.msg}. Export it again") from None
    except ValueError as error:
        raise UserError(f"{directory}: a code file is not Python: {error}. Export it again") from None


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _link(source: str, target: str) -> None:
    """Link `target` to `source`; copy it on a file system without hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
