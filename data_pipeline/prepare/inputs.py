"""List the files that a source names, in order, and what identifies them."""

import glob
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.system.errors import UserError
from data_pipeline.storage.manifest import compute_sha256, sample_sha256

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
IMAGE_CHAT_SUFFIXES = (*SUFFIXES, ".tar")
# Files beside the inputs of image chats that records may name.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class InputFile:
    """Identify an input file.

    name: unique within the source, the same wherever the source lies. path: where it is. size: bytes.
    sample_sha256: of chunks spread over the file (all of a small one), which shows a change without reading terabytes.
    """

    name: str
    path: Path
    size: int
    sample_sha256: str

    @property
    def suffix(self) -> str:
        """Return the one of IMAGE_CHAT_SUFFIXES that the name ends with."""
        return next(suffix for suffix in IMAGE_CHAT_SUFFIXES if self.name.endswith(suffix))


def is_saved_dataset(path: Path) -> bool:
    """Return whether `path` is a folder that `datasets` wrote with save_to_disk."""
    if (path / "dataset_dict.json").is_file():
        return True
    # A folder of .jsonl may happen to contain a state.json.
    return all((path / name).is_file() for name in ("state.json", "dataset_info.json")) and any(path.glob("*.arrow"))


def list_input_files(files: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[InputFile]:
    """Return the input files that a file, a folder or a glob names, in the order of their names.

    suffixes: of the formats that are read.
    Raises UserError: nothing there, a format that prepare does not read, a file named twice or with the content of
    another (a duplicate shard would count its documents twice).
    """
    root, paths = _find(files, suffixes)
    inputs = [_identify(path, path.relative_to(root).as_posix()) for path in sorted(paths, key=Path.as_posix)]
    _refuse_duplicates(inputs)
    return inputs


def list_left_out(files: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[str]:
    """Return the names of files in a folder of inputs that prepare does not read. Raises as list_input_files does."""
    folder = Path(files).expanduser()
    if not folder.is_dir() or is_saved_dataset(folder):
        return []
    root, paths = _find(files, suffixes)
    taken = set(paths)
    others = (path for path in walk_files(root) if not path.name.startswith("."))
    if suffixes is IMAGE_CHAT_SUFFIXES:
        others = (path for path in others if not path.name.lower().endswith(PICTURE_SUFFIXES))
    return sorted(path.relative_to(root).as_posix() for path in others if path not in taken)


def list_surprises(files: str) -> list[str]:
    """Return what a user may not expect of a folder of inputs: links that are followed, hidden folders that are not."""
    folder = Path(files).expanduser()
    if not folder.is_dir() or is_saved_dataset(folder):
        return []
    links, hidden = [], []
    for path, names, _ in _walk(folder):
        links += [path / name for name in names if (path / name).is_symlink()]
        hidden += [entry for entry in path.iterdir() if entry.is_dir() and entry.name.startswith(".")]
    said = [f"{path} is a link that is followed" for path in sorted(links)]
    return said + [f"{path} is hidden and not read" for path in sorted(hidden)]


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder as a glob finds them: through links, not in hidden folders, in no cycle."""
    for path, _, names in _walk(folder):
        yield from (path / name for name in names if (path / name).is_file())


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk as os.walk does through links to folders, but not into hidden ones, nor into a folder that is above it."""
    for name, folders, files in os.walk(folder, followlinks=True):
        path = Path(name)
        folders[:] = sorted(inner for inner in folders if not inner.startswith(".") and not _is_cycle(path / inner))
        yield path, folders, files


def _is_cycle(folder: Path) -> bool:
    """Return whether a folder leads back to one of those above it, through a link."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _find(files: str, suffixes: tuple[str, ...]) -> tuple[Path, list[Path]]:
    """Return the folder that names are relative to, and the files."""
    path = Path(files).expanduser()
    if path.is_file():
        return path.parent, [_known_format(path, suffixes)]
    if path.is_dir():
        _refuse_saved_datasets(inner / name for inner, names, _ in _walk(path) for name in names)
        inputs = (inner for inner in walk_files(path) if _is_input(inner, suffixes))
        return path, _non_empty(inputs, f"the folder {path} holds no", suffixes)
    if not GLOB_CHARACTERS.intersection(files):
        raise UserError(f"{path} does not exist: give a file, a folder or a glob of {', '.join(suffixes)}")
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    cycles = {folder for folder in {parent for match in matches for parent in match.parents} if _is_cycle(folder)}
    matches = [match for match in matches if cycles.isdisjoint(match.parents)]
    _refuse_saved_datasets(filter(Path.is_dir, matches))
    found = (_known_format(match, suffixes) for match in matches if match.is_file())
    root = Path(*_before_wildcard(path))
    return root, _non_empty(found, f"the glob {files} matches no", suffixes)


def _refuse_saved_datasets(folders: Iterable[Path]) -> None:
    for folder in folders:
        if is_saved_dataset(folder):
            raise UserError(f"{folder} is a folder that `datasets` saved, among others: make it a source of its own")


def _before_wildcard(path: Path) -> list[str]:
    fixed = []
    for part in path.parts:
        if GLOB_CHARACTERS.intersection(part):
            break
        fixed.append(part)
    return fixed


def _is_input(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.endswith(suffixes) and not path.name.startswith(".")


def _known_format(path: Path, suffixes: tuple[str, ...]) -> Path:
    if not path.name.endswith(suffixes):
        raise UserError(f"{path}: prepare reads {', '.join(suffixes)}, and folders that `datasets` saved")
    return path


def _non_empty(paths: Iterable[Path], what: str, suffixes: tuple[str, ...]) -> list[Path]:
    if found := list(paths):
        return found
    raise UserError(f"{what} file named {', '.join('*' + suffix for suffix in suffixes)}")


def _identify(path: Path, name: str) -> InputFile:
    try:
        size = path.stat().st_size
        return InputFile(name, path, size, sample_sha256(path, size))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _refuse_duplicates(inputs: list[InputFile]) -> None:
    alike: dict[str, list[InputFile]] = defaultdict(list)
    for item in inputs:
        if item.size:
            alike[item.sample_sha256].append(item)
    for group in alike.values():
        first_with: dict[str, InputFile] = {}
        for item in group if len(group) > 1 else ():
            former = first_with.setdefault(compute_sha256(item.path), item)
            if former is not item:
                raise UserError(
                    f"{former.path} and {item.path} are the same {item.size} bytes: a duplicate shard would count its "
                    "documents twice; remove one of them"
                )
