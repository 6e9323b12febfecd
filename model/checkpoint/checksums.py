"""SHA-256 sums of a directory's files, which reveal damaged or changed ones. Standard library only.

    <step>/SHA256SUMS     one line per other file, as `sha256sum` writes them (`sha256sum -c SHA256SUMS` checks them)

Step directories and exports have this file; draft adapters, which may be added to an export later, have their own.

It is written last, so a directory that has it is complete. Every byte counts, also in SHA256SUMS: a line that does not
parse and a file too many or too few are damage, too.
"""

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conf.system.atomic import atomic_write_text

SUMS_NAME = "SHA256SUMS"
PART_SUFFIX = ".sums"  # sums by one of several writers; a complete directory has none
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
_NUM_THREADS = 8


def hash_file(path: Path | str) -> str:
    """Compute the SHA-256 of a file in hexadecimal. Raises: OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(directory: Path | str) -> list[str]:
    """List the files below `directory` that have a sum, relative to it, sorted."""
    directory = Path(directory)
    found = (path for path in directory.rglob("*") if path.is_file())
    names = (path.relative_to(directory).as_posix() for path in found)
    return sorted(name for name in names if name != SUMS_NAME and not name.endswith(PART_SUFFIX))


def write_part(directory: Path | str, names: Iterable[str], writer: int) -> None:
    """Sum the files that `writer`, perhaps another process, has written; write_sums collects the parts."""
    directory = Path(directory)
    lines = [f"{hash_file(directory / name)}  {name}\n" for name in names]
    atomic_write_text(directory / f"{writer}{PART_SUFFIX}", "".join(lines))


def write_sums(directory: Path | str) -> None:
    """Write SHA256SUMS from the parts of write_part; files without a sum are summed now."""
    directory = Path(directory)
    sums: dict[str, str] = {}
    for part in sorted(directory.glob(f"*{PART_SUFFIX}")):
        sums |= _parse(part.read_text(encoding="utf-8")) or {}
        part.unlink()
    names = list_files(directory)
    sums |= hash_files(directory, [name for name in names if name not in sums])
    save_sums(directory, {name: sums[name] for name in names})


def save_sums(directory: Path | str, sums: dict[str, str]) -> None:
    """Write `sums` (file name -> sum) as the SHA256SUMS of `directory`."""
    text = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    atomic_write_text(Path(directory) / SUMS_NAME, text)


def read_sums(directory: Path | str) -> dict[str, str] | None:
    """Read SHA256SUMS as file name -> sum; None if it is missing or damaged."""
    try:
        return _parse((Path(directory) / SUMS_NAME).read_bytes().decode("utf-8"))
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def find_wrong_names(directory: Path | str) -> str | None:
    """Say which files are missing from or unknown to SHA256SUMS, or return None. Reads no other file."""
    sums = read_sums(directory)
    if sums is None:
        return f"{SUMS_NAME} is missing or damaged"
    if wrong := sorted(set(list_files(directory)) ^ set(sums)):
        return f"the files are not those of {SUMS_NAME} ({', '.join(wrong[:3])})"
    return None


def find_changed(directory: Path | str, sums: dict[str, str], names: Iterable[str]) -> str | None:
    """Say which of the files `names` has changed, or return None. Raises: OSError if one cannot be read."""
    found = (name for name, now in hash_files(directory, names).items() if now != sums[name])
    changed = next(found, None)
    return changed and f"{changed} has another checksum than when it was written"


def find_damage(directory: Path | str) -> str | None:
    """Read all files and say what is wrong, or return None. Raises: OSError if one cannot be read."""
    sums = read_sums(directory) or {}
    return find_wrong_names(directory) or find_changed(directory, sums, sums)


def share_of(sizes: dict[str, int], reader: int, num_readers: int) -> list[str]:
    """Return the files that one of several readers checks, so that each file is read once and the load is even.

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
    """Hash files in parallel; return name -> sum. Raises: OSError if one cannot be read."""
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        return dict(threads.map(lambda name: (name, hash_file(Path(directory, name))), list(names)))


def _parse(text: str) -> dict[str, str] | None:
    matches = [_LINE.fullmatch(line) for line in text.split("\n")[:-1]]
    if not text.endswith("\n") or not all(matches):
        return None
    return {match[2]: match[1] for match in matches if match}
