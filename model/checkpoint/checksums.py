"""SHA-256 sums of a directory's files: what tells a damaged or changed one from a good one. Standard library only.

    <step>/SHA256SUMS     one line per other file, as `sha256sum` writes them (`sha256sum -c SHA256SUMS` checks them)

Step directories have it, and so do exports and, for themselves, the draft adapters that are put into exports later.

It is written last, so a directory that has it has everything. Every byte of every file counts, its own included: a
line that does not parse, a file too many or too few is damage as well.
"""

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conf.system.atomic import atomic_write_text

SUMS_NAME = "SHA256SUMS"
PART_SUFFIX = ".sums"  # what one writer of several has summed so far; gone in a complete directory
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
_READERS = 8


def hash_file(path: Path | str) -> str:
    """SHA-256 of a file in hexadecimal. Raises: OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(directory: Path | str) -> list[str]:
    """Files below `directory` that have a sum, relative to it, sorted."""
    directory = Path(directory)
    found = (path for path in directory.rglob("*") if path.is_file())
    names = (path.relative_to(directory).as_posix() for path in found)
    return sorted(name for name in names if name != SUMS_NAME and not name.endswith(PART_SUFFIX))


def write_part(directory: Path | str, names: Iterable[str], writer: int) -> None:
    """Sum the files that `writer` wrote, in a process of its own perhaps; write_sums takes them over."""
    directory = Path(directory)
    lines = [f"{hash_file(directory / name)}  {name}\n" for name in names]
    atomic_write_text(directory / f"{writer}{PART_SUFFIX}", "".join(lines))


def write_sums(directory: Path | str) -> None:
    """Write SHA256SUMS: the sums of write_part, and those of files that have none yet."""
    directory = Path(directory)
    sums: dict[str, str] = {}
    for part in sorted(directory.glob(f"*{PART_SUFFIX}")):
        sums |= _parse(part.read_text(encoding="utf-8")) or {}
        part.unlink()
    names = list_files(directory)
    sums |= hash_files(directory, [name for name in names if name not in sums])
    save_sums(directory, {name: sums[name] for name in names})


def save_sums(directory: Path | str, sums: dict[str, str]) -> None:
    """Write `sums`, file name -> sum, as the SHA256SUMS of `directory`."""
    text = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    atomic_write_text(Path(directory) / SUMS_NAME, text)


def read_sums(directory: Path | str) -> dict[str, str] | None:
    """File name -> sum; None if SHA256SUMS is missing or damaged."""
    try:
        return _parse((Path(directory) / SUMS_NAME).read_bytes().decode("utf-8"))
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def find_wrong_names(directory: Path | str) -> str | None:
    """What is wrong with the list of files of a directory that should have SHA256SUMS, or None; reads only that."""
    sums = read_sums(directory)
    if sums is None:
        return f"{SUMS_NAME} is missing or damaged"
    if wrong := sorted(set(list_files(directory)) ^ set(sums)):
        return f"the files are not those of {SUMS_NAME} ({', '.join(wrong[:3])})"
    return None


def find_changed(directory: Path | str, sums: dict[str, str], names: Iterable[str]) -> str | None:
    """What is wrong with the content of files `names`, or None. Raises: OSError if one cannot be read."""
    found = (name for name, now in hash_files(directory, names).items() if now != sums[name])
    changed = next(found, None)
    return changed and f"{changed} has another checksum than when it was written"


def find_damage(directory: Path | str) -> str | None:
    """What is wrong with a directory, or None, for a reader of all its files. Raises: OSError if one cannot be read."""
    sums = read_sums(directory) or {}
    return find_wrong_names(directory) or find_changed(directory, sums, sums)


def share_of(sizes: dict[str, int], reader: int, num_readers: int) -> list[str]:
    """Files that one of several readers looks at: all are read once, and each reads about as many bytes.

    sizes: bytes of every file.
    """
    loads = [0] * num_readers
    mine = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        lightest = loads.index(min(loads))
        loads[lightest] += sizes[name] + 1
        if lightest == reader:
            mine.append(name)
    return mine


def hash_files(directory: Path | str, names: Iterable[str]) -> dict[str, str]:
    """Name -> sum of each file. Raises: OSError if one cannot be read."""
    with ThreadPoolExecutor(_READERS) as threads:
        return dict(threads.map(lambda name: (name, hash_file(Path(directory, name))), list(names)))


def _parse(text: str) -> dict[str, str] | None:
    matches = [_LINE.fullmatch(line) for line in text.split("\n")[:-1]]
    if not text.endswith("\n") or not all(matches):
        return None
    return {match[2]: match[1] for match in matches if match}
