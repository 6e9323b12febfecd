"""The corpus is deterministic, leaves out tables and tests, and keeps every tenth file for evaluation.

Chats made of the standard library's docstrings.
"""

import inspect
import json
import textwrap
from pathlib import Path

import pytest

from conf.system.errors import UserError
from data_pipeline.toy.corpus import (
    ChatSplit,
    default_root,
    list_source_files,
    load_docstring_chats,
    load_standard_library,
    write_jsonl,
)


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


@pytest.fixture(scope="module")
def split() -> ChatSplit:
    return load_docstring_chats()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Write twenty small sources."""
    for number in range(20):
        path = tmp_path / f"m{number:02}.py"
        path.write_text(f'def f{number}(a, *, b=1):\n    """Returns the sum of a and b, plus {number}."""\n')
    return tmp_path


def test_there_are_thousands_and_the_order_is_the_same_every_time(split: ChatSplit) -> None:
    assert len(split.train) > 2000
    assert len(split.heldout) > 200
    assert load_docstring_chats() == split


def test_every_form_of_chat_occurs(split: ChatSplit) -> None:
    for chats in (split.train, split.heldout):
        forms = {"-".join(message["role"][0] for message in chat["messages"]) for chat in chats}
        assert forms == {"u-a", "s-u-a", "u-a-u-a", "s-u-a-u-a"}


def test_responses_are_what_python_itself_says(split: ChatSplit) -> None:
    chats = [chat["messages"] for chat in split.train + split.heldout]
    responses = [chat[-1]["content"] for chat in chats if "textwrap.dedent" in chat[-2]["content"]]
    paragraph = inspect.cleandoc(textwrap.dedent.__doc__ or "").split("\n\n")[0]
    assert responses == [" ".join(paragraph.split())]


def test_files_held_out_as_text_are_held_out_as_chats(library: Path) -> None:
    (library / "m00b_empty.py").write_text("\n")  # counts in neither split
    texts, chats = load_standard_library(library), load_docstring_chats(library)
    for sources, dialogues in ((texts.train, chats.train), (texts.heldout, chats.heldout)):
        summaries = [source.split('"""')[1] for source in sources]
        assert [chat["messages"][-1 if len(chat["messages"]) < 4 else -3]["content"] for chat in dialogues] == summaries


def test_private_undocumented_and_unreadable_code_is_left_out(library: Path) -> None:
    before = load_docstring_chats(library)
    (library / "m01.py").write_text(
        'def f1(a, *, b=1):\n    """Returns the sum of a and b, plus 1."""\ndef g(): pass\n'
    )
    with open(library / "m02.py", "a") as file:
        file.write('def _h():\n    """Is nobody else\'s business."""\nclass C:\n    """Short."""\n')
    (library / "m20.py").write_text("def broken(:\n")
    assert load_docstring_chats(library) == before


def test_arguments_come_without_self_and_annotations(library: Path) -> None:
    body = 'class C:\n    def m(self, /, a: int, b: str = "x") -> None:\n        """Takes two arguments, a and b."""\n'
    for number in range(1, 10):
        (library / f"m{number:02}.py").write_text(body.replace("def m(", f"def m{number}("))
    text = json.dumps(load_docstring_chats(library).train)
    assert "C.m1" in text
    assert "(a, b='x')" in text
    assert "self" not in text


def test_a_library_without_docstrings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="too few documented"):
        load_docstring_chats(tmp_path)


def test_records_are_written_as_lines(tmp_path: Path) -> None:
    records = [{"messages": [{"role": "user", "content": "ä\n\u2028"}]}, {"messages": []}]
    write_jsonl(records, tmp_path / "folder" / "chats.jsonl")
    lines = (tmp_path / "folder" / "chats.jsonl").read_bytes().splitlines()
    assert [json.loads(line) for line in lines] == records
