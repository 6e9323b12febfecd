"""Compiled kernels survive a process; a file that cannot be used or written is a warning."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.run.kernel_cache import MOST_PARTS, KernelCache, name_cache_file, open_kernel_cache
from pretrain.run.process_group import Ranks
from tests.helpers.processes import compile_on_ranks

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelCache:
    """Return a cache with a whole file, of which torch's part is none of torch's formats."""
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"kernels", None))
    cache = KernelCache(tmp_path / "kernels" / name_cache_file(CPU), is_writer=True)
    cache.save()
    assert cache.path.exists()
    return cache


def test_kernels_are_compiled_once_and_then_loaded_by_all_processes(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    (cold,) = compile_on_ranks(1, "matmul", tmp_path / "cold", saved, tmp_path / "machine_1")
    assert cold["compiled"] == 4 and cold["loaded"] == 0
    (file,) = saved.iterdir()
    content = file.read_bytes()
    for note in compile_on_ranks(2, "matmul", tmp_path / "warm", saved, tmp_path / "machine_2"):
        assert note["compiled"] == 0 and note["loaded"] == 4
    assert [path.read_bytes() for path in saved.iterdir()] == [content]  # there was nothing to add


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_file_is_a_warning_and_torch_never_sees_it(cache, monkeypatch, caplog, damage: str) -> None:
    content = bytearray(cache.path.read_bytes())
    content[-1] ^= 1
    cache.path.write_bytes({"flipped": bytes(content), "cut": content[:20], "empty": b""}[damage])
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda artifacts: pytest.fail("torch was asked"))
    assert cache.load() == 0
    assert "it is damaged" in caplog.text and "compiles its kernels" in caplog.text


def test_whatever_torch_raises_is_a_warning(cache: KernelCache, monkeypatch, caplog) -> None:
    def refuse(*artifacts: bytes) -> None:
        raise RuntimeError("another version")

    assert cache.load() == 0 and "torch does not understand it" in caplog.text
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", refuse)
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", refuse)
    assert cache.load() == 0
    before = cache.path.read_bytes()
    cache.save()
    assert caplog.text.count("another version") == 2 and cache.path.read_bytes() == before


def test_a_folder_that_cannot_be_written_is_a_warning(cache: KernelCache, caplog) -> None:
    blocked = KernelCache(cache.path / "file" / "below_a_file", is_writer=True)
    blocked.save()
    assert blocked.load() == 0 and "cannot be written" in caplog.text


def test_what_was_saved_before_stays(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[bytes] = []

    def load(artifacts: bytes) -> Any:
        loaded.append(artifacts)
        return SimpleNamespace(artifacts={"inductor": ["one", "two"]})

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    later = KernelCache(cache.path, is_writer=True)
    assert not later.has_file and later.load() == 2 and later.has_file
    for number in range(MOST_PARTS + 1):
        monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda part=bytes([number]): (part, None))
        later.save()
        loaded.clear()
        last = KernelCache(cache.path, is_writer=False)
        last.load()
        assert loaded == [b"kernels", *(bytes([part]) for part in range(number + 1))][-MOST_PARTS:]


def test_no_file_yet_is_no_warning_and_only_the_writer_writes(cache: KernelCache, tmp_path: Path, caplog) -> None:
    reader = KernelCache(tmp_path / "others" / "file", is_writer=False)
    assert reader.load() == 0
    reader.save()
    assert not reader.path.exists() and not caplog.records


@pytest.mark.parametrize(("rank", "writes"), [(0, False), (1, True), (2, False)])
def test_the_first_rank_with_a_device_of_its_kind_and_number_writes(tmp_path, monkeypatch, rank, writes) -> None:
    of_ranks = ["another", name_cache_file(CPU), name_cache_file(CPU)]
    monkeypatch.setattr("pretrain.run.kernel_cache.gather_over_ranks", lambda compute: of_ranks)
    cache = open_kernel_cache(str(tmp_path), Ranks(rank, 3, CPU))
    assert cache is not None and cache.is_writer is writes
    assert open_kernel_cache(None, Ranks(rank, 3, CPU)) is None


def test_files_are_named_after_torch_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    names = [name_cache_file(torch.device("cuda", number)) for number in (0, 3)]
    assert names[1] == f"torch-{torch.__version__}_NVIDIA-H100-80GB-HBM3_3.kernels"
    assert len({*names, name_cache_file(CPU)}) == 3
