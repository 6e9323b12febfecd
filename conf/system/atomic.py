"""Atomic writes: a file or folder with its final name is always complete.

Everything is written under a temporary name in the same directory, flushed to disk and renamed. A process killed at
any moment leaves at worst a leftover whose name ends in `.partial`, which nobody reads and the next write removes.
Standard library only; everyone may import this.
"""

import ctypes
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from conf.system.errors import UserError
from conf.system.lock import locking_directory

PARTIAL_SUFFIX = ".partial"


def partial_path(path: Path | str) -> Path:
    """Return the name of `path` while it is written: a sibling, so that the rename cannot cross disks."""
    path = Path(path)
    return path.with_name(path.name + PARTIAL_SUFFIX)


def own_partial_path(path: Path) -> Path:
    """Return a partial path of this process alone, so that two writers of one file, on any host, do not share it."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL_SUFFIX}")


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` to `path`, replacing an earlier file. Parent directories are created.

    Raises: OSError (full disk, no permission); `path` then still holds what it held before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that becomes `path` when the block succeeds; see atomic_write_bytes."""
    temporary = own_partial_path(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_directory(path.parent)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8 to `path`; see atomic_write_bytes."""
    atomic_write_bytes(path, text.encode("utf-8"))


@contextmanager
def atomic_directory(path: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new empty sibling of `path`; when the block succeeds it is flushed and renamed to `path`.

    When the block raises, the sibling is removed and `path` is as before. Siblings that killed processes have left are
    removed first; those of living ones stay, and whoever ends last has written `path`.

    replace: an existing, non-empty `path` is exchanged for the new directory at the end instead of refused.
    Raises: UserError (before anything is written) if `path` exists, is not empty and `replace` is False.
    """
    path = Path(os.path.abspath(path))  # `.` has no name
    _restore_former(path)
    if not replace:
        refuse_used_path(path)
    _remove_abandoned(path)
    partial = own_partial_path(path)
    partial.mkdir(parents=True)
    with locking_directory(partial):
        try:
            yield partial
            fsync_tree(partial)
            publish_directory(partial, path)
        except BaseException:
            _remove(partial)
            raise


def _remove_abandoned(path: Path) -> None:
    """Remove the siblings that killed writers of the directory `path` have left."""
    for name in glob.glob(f".{glob.escape(path.name)}.*{PARTIAL_SUFFIX}", root_dir=path.parent, include_hidden=True):
        partial = path.parent / name
        if partial.is_dir():
            with suppress(OSError), locking_directory(partial) as is_abandoned:
                if is_abandoned:
                    shutil.rmtree(partial)


def publish_directory(partial: Path, path: Path) -> None:
    """Rename the complete directory `partial` to `path`; an earlier `path` is moved out of the way and deleted.

    Where the system can, both exchange their names in one step; elsewhere there is a moment without `path`. What is
    left of the earlier one, if it cannot be deleted, has a name that ends in `.partial`.
    """
    former = partial
    if not _exchange(partial, path):
        former = _former_path(path)
        with suppress(FileNotFoundError):
            os.rename(path, former)
        try:
            os.rename(partial, path)
        except BaseException:
            _restore_former(path)
            raise
    _fsync_directory(path.parent)
    with suppress(OSError):
        _remove(former)


def _former_path(path: Path) -> Path:
    return path.with_name(path.name + ".former" + PARTIAL_SUFFIX)


def _restore_former(path: Path) -> None:
    """Give back its name to a directory that a process was about to replace when it ended; remove one that was."""
    former = _former_path(path)
    if path.exists():
        with suppress(OSError):
            _remove(former)
    elif former.exists():
        os.rename(former, path)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two directories in one step; return False where that cannot be done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None or not second.is_dir():
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def refuse_used_path(path: Path) -> None:
    """Raise UserError if `path` is a file or a directory with something in it."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise UserError(f"{path} exists and is not an empty directory: choose another name or remove it")


def fsync_tree(directory: Path) -> None:
    """Flush every file and folder below `directory` to disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            _fsync(Path(folder, name), os.O_RDONLY)
        _fsync_directory(Path(folder))


def _fsync_directory(directory: Path) -> None:
    _fsync(directory, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Delete a file or a whole directory if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
