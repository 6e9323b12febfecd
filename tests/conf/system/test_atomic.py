"""Files and folders with their final name are complete, whatever happens while they are written."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conf.system import atomic
from conf.system.errors import UserError


def test_a_written_file_holds_the_text_and_leaves_nothing_else(tmp_path):
    atomic.atomic_write_text(tmp_path / "new" / "a.txt", "grüße\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "grüße\n".encode()
    assert os.listdir(tmp_path / "new") == ["a.txt"]


def test_a_failed_write_keeps_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    atomic.atomic_write_bytes(path, b"old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        atomic.atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_directory_appears_only_when_its_block_succeeds(tmp_path):
    target = tmp_path / "out"
    with atomic.atomic_directory(target) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "x").write_text("1")
        assert partial.parent == tmp_path
        assert not target.exists()
    assert (target / "sub" / "x").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_an_exception_in_the_block_leaves_no_trace(tmp_path):
    with pytest.raises(RuntimeError), atomic.atomic_directory(tmp_path / "out") as partial:
        (partial / "x").write_text("1")
        raise RuntimeError("boom")
    assert os.listdir(tmp_path) == []


def test_a_used_target_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(UserError, match="out exists"), atomic.atomic_directory(tmp_path / "out"):
        raise AssertionError("the block must not run")
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_target_is_accepted(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic.atomic_directory(tmp_path / "out") as partial:
        (partial / "x").write_text("1")
    assert os.listdir(tmp_path / "out") == ["x"]


def test_replace_exchanges_the_former_directory_only_on_success(tmp_path):
    target = tmp_path / "out"
    with atomic.atomic_directory(target) as partial:
        (partial / "old").write_text("1")
    with pytest.raises(RuntimeError), atomic.atomic_directory(target, replace=True):
        raise RuntimeError("boom")
    assert os.listdir(target) == ["old"]
    with atomic.atomic_directory(target, replace=True) as partial:
        (partial / "new").write_text("2")
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_killed_writer_leaves_only_a_partial_which_the_next_writer_replaces(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from conf.system.atomic import atomic_directory\n"
        "with atomic_directory(sys.argv[1]) as partial:\n"
        "    (partial / 'half').write_text('1')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".out.") and left.endswith(".partial")
    with atomic.atomic_directory(tmp_path / "out") as partial:
        (partial / "x").write_text("1")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["x"]


def test_a_directory_is_never_gone_while_it_is_replaced(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("there was a moment without it"))
    with atomic.atomic_directory(target, replace=True) as partial:
        (partial / "new").touch()
    assert os.listdir(target) == ["new"] and os.listdir(tmp_path) == ["out"]


@pytest.fixture
def without_exchange(monkeypatch):
    """Work as on a file system that cannot exchange names."""
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)


def test_without_exchange_a_failing_rename_gives_the_former_directory_back(tmp_path, monkeypatch, without_exchange):
    target, rename = tmp_path / "out", os.rename
    target.mkdir()
    (target / "old").touch()

    def fail_on_publishing(source, destination):
        if str(destination) == str(target) and "former" not in str(source):
            raise OSError("no")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_on_publishing)
    with pytest.raises(OSError, match="no"), atomic.atomic_directory(target, replace=True):
        pass
    assert os.listdir(target) == ["old"] and os.listdir(tmp_path) == ["out"]


def test_what_a_process_killed_between_two_renames_has_left_is_restored(tmp_path, without_exchange):
    (tmp_path / "out.former.partial").mkdir()
    (tmp_path / "out.former.partial" / "old").touch()
    with pytest.raises(UserError, match="out exists"), atomic.atomic_directory(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path / "out") == ["old"]
    with atomic.atomic_directory(tmp_path / "out", replace=True) as partial:
        (partial / "new").touch()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["new"]


def test_a_living_writers_directory_is_left_alone(tmp_path, monkeypatch):
    with atomic.atomic_directory(tmp_path / "out", replace=True) as first:
        (first / "first").touch()
        monkeypatch.setattr(atomic.os, "getpid", lambda: 1)  # another process
        with atomic.atomic_directory(tmp_path / "out", replace=True) as second:
            (second / "second").touch()
            assert first != second
        assert os.listdir(first) == ["first"] and os.listdir(tmp_path / "out") == ["second"]
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["first"]
