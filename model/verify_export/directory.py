"""Checks the files of an export: which there are, whether they are as published, and what does not belong there."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.system.errors import UserError
from model.checkpoint.checksums import SUMS_NAME, hash_files, read_sums
from model.convert.hf_target import TOKENIZER_FILES
from model.convert.safetensors_reader import INDEX_NAME, some
from model.export.adapter_weights import WEIGHTS_FILE
from model.export.draft_adapter import ADAPTER_FOLDER, CONFIG_FILE
from model.export.shipped_code import CONFIG_NAME, GENERATION_CONFIG_NAME, PROCESSOR_CONFIG_NAME
from model.verify_export.check import ExportCheck

# Folders that git and huggingface_hub add when they fetch an export.
BOOKKEEPING = (".git", ".cache/huggingface")
# Formats that can execute code when they are loaded.
EXECUTABLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".so", ".pyc", ".dll")
KNOWN_NAMES = {CONFIG_NAME, GENERATION_CONFIG_NAME, INDEX_NAME, SUMS_NAME, CONFIG_FILE, WEIGHTS_FILE, "drafter.json"}
KNOWN_NAMES |= {
    PROCESSOR_CONFIG_NAME,
    *TOKENIZER_FILES,
    ".gitattributes",
    ".gitignore",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
}
KNOWN_SUFFIXES = (".safetensors", ".py", ".md", ".png", ".jpg", ".jpeg", ".svg", ".gif", ".pdf")


@dataclass(frozen=True)
class Files:
    """The contents of an export; all names are relative to `directory`.

    Attributes:
        directory: the export.
        names: its files.
        links: links to folders, or to nothing.
        outside: those of `names` that are links out of the export.
        specials: pipes, sockets and devices, which block whoever reads them.
    """

    directory: Path
    names: list[str]
    links: list[str]
    outside: list[str]
    specials: list[str]

    @property
    def adapters(self) -> list[str]:
        """Folders of PEFT adapters."""
        configs = (Path(name) for name in self.names if Path(name).name == CONFIG_FILE)
        return sorted(path.parent.as_posix() for path in configs if path.parent != Path())

    @property
    def signing(self) -> list[str]:
        """Folders that may have their own SHA256SUMS: that of the adapter which decoding uses."""
        return [folder for folder in self.adapters if folder == ADAPTER_FOLDER]


@dataclass(frozen=True)
class Sums:
    """Checksums, recorded and computed.

    Attributes:
        recorded: file -> sum in the SHA256SUMS of the export and of its adapter.
        now: file -> sum of every file as it is.
        damaged: SHA256SUMS files that cannot be parsed.
    """

    recorded: dict[str, str]
    now: dict[str, str]
    damaged: list[str]


def list_export(directory: Path) -> Files:
    """List every file below `directory` except bookkeeping. Raises: OSError if a folder cannot be read."""
    files, links, specials = [], [], []
    for path in _walk(directory):
        kind = files if path.is_file() else specials if path.exists() and not path.is_dir() else links
        kind.append(path)
    outside = [path for path in files if path.is_symlink() and not _leads_inside(path, directory)]
    found = ([path.relative_to(directory).as_posix() for path in kind] for kind in (files, links, outside, specials))
    return Files(directory, *map(sorted, found))


def _walk(directory: Path) -> Iterator[Path]:
    """Yield everything that is not a folder, links to folders included."""
    for folder, folders, files in os.walk(directory, onerror=_raise):
        here = Path(folder).relative_to(directory)
        folders[:] = [name for name in folders if (here / name).as_posix() not in BOOKKEEPING]
        yield from (Path(folder, name) for name in folders if Path(folder, name).is_symlink())
        yield from (Path(folder, name) for name in files)


def _leads_inside(link: Path, directory: Path) -> bool:
    """Return whether a link stays in the export; in the hub's cache, in the repository's folder, which holds blobs/."""
    export = directory.resolve()
    return link.resolve().is_relative_to(export.parents[1] if export.parent.name == "snapshots" else export)


def _raise(error: OSError) -> None:
    raise error


def read_all_sums(files: Files) -> Sums:
    """Hash every file, and read every SHA256SUMS. Raises: OSError if a file cannot be read."""
    recorded, damaged = dict[str, str](), []
    for folder in (".", *files.signing):  # the export first: no adapter can overrule its sums
        name = (Path(folder) / SUMS_NAME).as_posix()
        if name not in files.names:
            continue
        sums = read_sums(files.directory / folder)
        if sums is None:
            damaged.append(name)
        recorded = {(Path(folder) / inner).as_posix(): value for inner, value in (sums or {}).items()} | recorded
    return Sums(recorded, hash_files(files.directory, files.names), damaged)


def check_sums(files: Files, sums: Sums) -> ExportCheck:
    """Check that the files are those of SHA256SUMS, no more, no fewer, unchanged. The adapter may have its own sums."""
    name = "checksums"
    if sums.damaged:
        return ExportCheck.failed(
            name, f"damaged: {some(sums.damaged)}", "fetch the export again: it is unknown who changed it"
        )
    if SUMS_NAME not in files.names:
        detail = f"the export has no {SUMS_NAME}: it cannot be checked whether its files are as published"
        return ExportCheck.warned(
            name, detail, "compare the report's sums with the publisher's, then record them: --write-sums"
        )
    problems, unsigned = _compare(files, sums)
    if problems:
        remedy = f"fetch the export again; if you changed it yourself, delete {SUMS_NAME} and run with --write-sums"
        return ExportCheck.failed(name, "; ".join(f"{what}: {some(found)}" for what, found in problems.items()), remedy)
    if unsigned:
        return ExportCheck.warned(
            name, f"adapter without a {SUMS_NAME}: {some(unsigned)}", "record its sums: --write-sums"
        )
    return ExportCheck.passed(name, f"{len(sums.recorded)} files are those of {SUMS_NAME}")


def _compare(files: Files, sums: Sums) -> tuple[dict[str, list[str]], list[str]]:
    """Return (what is wrong -> files, files of adapters without sums)."""
    lists = {(Path(folder) / SUMS_NAME).as_posix() for folder in (".", *files.signing)}
    listed = {file for file in files.names if file in sums.recorded or file not in lists}
    extra = sorted(listed - sums.recorded.keys())
    unsigned = [file for file in extra if file not in _files_of(files, ".") and not _has_sums(files, file)]
    groups = {
        "missing": sorted(sums.recorded.keys() - listed),
        "changed": sorted(file for file in listed & sums.recorded.keys() if sums.now[file] != sums.recorded[file]),
        "not listed": [file for file in extra if file not in unsigned],
    }
    return {what: found for what, found in groups.items() if found}, unsigned


def _has_sums(files: Files, file: str) -> bool:
    """Return whether the adapter that `file` belongs to has sums."""
    return any(file.startswith(f"{folder}/") and f"{folder}/{SUMS_NAME}" in files.names for folder in files.signing)


def find_unsummed_folders(files: Files, sums: Sums) -> list[str]:
    """Return where --write-sums writes SHA256SUMS: the export and its adapter, if they have none."""
    folders = [*files.signing, "."]
    uncovered = {file for file in files.names if file not in sums.recorded}
    return [
        folder
        for folder in folders
        if not (files.directory / folder / SUMS_NAME).is_file() and uncovered & {*_files_of(files, folder)}
    ]


def new_sums(files: Files, sums: Sums, folder: str) -> dict[str, str]:
    """Return the sums for the SHA256SUMS of `folder`, relative to it."""
    own = (Path(folder) / SUMS_NAME).as_posix()
    names = (name for name in _files_of(files, folder) if name != own)
    return {Path(name).relative_to(folder).as_posix(): sums.now[name] for name in names}


def _files_of(files: Files, folder: str) -> list[str]:
    """List the files that the SHA256SUMS of `folder` covers; those of an adapter are not the export's."""
    if folder != ".":
        return [name for name in files.names if name.startswith(f"{folder}/")]
    return [name for name in files.names if not any(name.startswith(f"{inner}/") for inner in files.signing)]


def check_strays(files: Files) -> ExportCheck:
    """Check that nothing lies there that is not part of an export or that runs code when loaded."""
    name = "other files"
    if executable := [file for file in files.names if file.lower().endswith(EXECUTABLE_SUFFIXES)]:
        return ExportCheck.failed(
            name, f"can run code when loaded: {some(executable)}", "remove it; weights are safetensors"
        )
    if files.specials:
        return ExportCheck.failed(
            name, f"not a regular file: {some(files.specials)}", "remove it: whoever reads it may wait forever"
        )
    if files.links:
        return ExportCheck.failed(
            name, f"link to a folder, or to nothing: {some(files.links)}", "replace it with copies"
        )
    if files.outside:
        return ExportCheck.warned(name, f"link out of the export: {some(files.outside)}", "replace it with copies")
    if strays := [file for file in files.names if not _is_known(file)]:
        return ExportCheck.warned(
            name, f"not part of the format: {some(strays)}", "remove what should not be published"
        )
    return ExportCheck.passed(name, "none")


def _is_known(file: str) -> bool:
    return Path(file).name in KNOWN_NAMES or file.lower().endswith(KNOWN_SUFFIXES)


def refuse_non_export(directory: Path) -> None:
    """Refuse a directory that cannot be an export, damaged or not. Raises: UserError."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: give the folder of an export")
    if (directory / "checkpoints").is_dir():
        raise UserError(f"{directory} is a run: export it first, python -m model.convert --from {directory} --to DIR")
    if not (directory / CONFIG_NAME).is_file() and not any(directory.glob("*.safetensors")):
        raise UserError(f"{directory} holds neither {CONFIG_NAME} nor *.safetensors: give the folder of an export")
