"""One changed byte, one file more or less: a summed directory notices."""

import errno
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from model.checkpoint import checksums
from model.checkpoint.checksums import (
    SUMS_NAME,
    find_changed,
    find_damage,
    list_files,
    read_sums,
    share_of,
    write_part,
    write_sums,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Write a few files with sums, of which one writer had summed its own before."""
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    generator = random.Random(0)
    for name, size in (("__0_0.distcp", 5000), ("__1_0.distcp", 70_000), (".metadata", 300), ("checkpoint.json", 40)):
        (folder / name).write_bytes(generator.randbytes(size))
    write_part(folder, ["__1_0.distcp"], writer=1)
    write_sums(folder)
    return folder


def test_sums_are_those_of_sha256sum(directory: Path) -> None:
    assert list_files(directory) == [".metadata", "__0_0.distcp", "__1_0.distcp", "checkpoint.json"]
    subprocess.run(["sha256sum", "--check", "--strict", SUMS_NAME], cwd=directory, check=True, capture_output=True)
    assert find_damage(directory) is None


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "checkpoint.json", SUMS_NAME])
def test_every_flipped_bit_is_noticed(directory: Path, name: str) -> None:
    content = (directory / name).read_bytes()
    generator = random.Random(name)
    for _ in range(60):
        place, bit = generator.randrange(len(content)), 1 << generator.randrange(8)
        (directory / name).write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        assert find_damage(directory) is not None, (place, bit)
    (directory / name).write_bytes(content)
    assert find_damage(directory) is None


def test_missing_added_exchanged_and_cut_off_files_are_noticed(directory: Path, tmp_path: Path) -> None:
    def damage(change: object) -> str | None:
        copy = Path(shutil.copytree(directory, tmp_path / "copy"))
        change(copy)  # type: ignore[operator]
        found = find_damage(copy)
        shutil.rmtree(copy)
        return found

    def exchange(copy: Path) -> None:
        (copy / "__0_0.distcp").rename(copy / "other")
        (copy / "__1_0.distcp").rename(copy / "__0_0.distcp")
        (copy / "other").rename(copy / "__1_0.distcp")

    assert "__0_0" in str(damage(lambda copy: (copy / "__0_0.distcp").unlink()))
    assert "more" in str(damage(lambda copy: (copy / "more").touch()))
    assert "checksum" in str(damage(exchange))
    assert "checksum" in str(damage(lambda copy: (copy / ".metadata").write_bytes(b"")))
    assert SUMS_NAME in str(damage(lambda copy: (copy / SUMS_NAME).unlink()))


def test_readers_share_the_files_and_each_is_read_once(directory: Path) -> None:
    sums = read_sums(directory)
    assert sums is not None
    sizes = {name: (directory / name).stat().st_size for name in sums}
    for num_readers in (1, 2, 3, 9):
        shares = [share_of(sizes, reader, num_readers) for reader in range(num_readers)]
        assert sorted(name for share in shares for name in share) == sorted(sums)
    assert share_of(sizes, 0, 2) == ["__1_0.distcp"]  # as many bytes as all the others and more
    (directory / "__1_0.distcp").write_bytes(b"other")
    assert find_changed(directory, sums, ["__0_0.distcp"]) is None
    assert "__1_0.distcp" in str(find_changed(directory, sums, ["__1_0.distcp"]))


def test_a_file_that_cannot_be_read_is_not_called_changed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(checksums, "hash_file", fail)
    with pytest.raises(OSError, match="Stale file handle"):
        find_damage(directory)
