"""The corpus is deterministic, leaves out tables and tests, and keeps every tenth file for evaluation."""

from pathlib import Path

import pytest

from conf.system.errors import UserError
from data_pipeline.standard_library import default_root, list_source_files, load_standard_library


def write_sources(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")


def test_every_tenth_file_is_held_out_and_none_is_lost(tmp_path: Path) -> None:
    names = [f"m{i:02d}.py" for i in range(25)]
    write_sources(tmp_path, names)
    split = load_standard_library(tmp_path)
    assert split.heldout == [f"# m{i:02d}.py\n" for i in (0, 10, 20)]
    assert sorted(split.train + split.heldout) == [f"# {name}\n" for name in names]


def test_tables_tests_and_machine_dependent_files_are_left_out(tmp_path: Path) -> None:
    write_sources(tmp_path, ["a/b.py", "json/x.py", "test/t.py", "a/test/t.py", "encodings/e.py", "site-packages/s.py"])
    write_sources(tmp_path, ["_sysconfigdata__linux_.py", "config-3.12/c.py"])
    assert list_source_files(tmp_path) == [tmp_path / "a/b.py", tmp_path / "json/x.py"]


def test_this_pythons_library_is_a_corpus_of_megabytes() -> None:
    files = list_source_files(default_root())
    assert len(files) > 300
    assert sum(file.stat().st_size for file in files) > 4e6


def test_a_python_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ships the sources"):
        load_standard_library(tmp_path)
