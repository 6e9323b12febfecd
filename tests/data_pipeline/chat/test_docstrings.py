"""Chats made of the standard library's docstrings."""

import inspect
import json
import textwrap
from pathlib import Path

import pytest

from conf.system.errors import UserError
from data_pipeline.chat.docstrings import ChatSplit, load_docstring_chats
from data_pipeline.chat.encoder import ChatEncoder
from data_pipeline.prepare.encoders import Skip
from data_pipeline.standard_library import load_standard_library
from data_pipeline.storage.jsonl import write_jsonl


@pytest.fixture(scope="module")
def split() -> ChatSplit:
    return load_docstring_chats()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Twenty small sources."""
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


def test_answers_are_what_python_itself_says(split: ChatSplit) -> None:
    chats = [chat["messages"] for chat in split.train + split.heldout]
    answers = [chat[-1]["content"] for chat in chats if "textwrap.dedent" in chat[-2]["content"]]
    paragraph = inspect.cleandoc(textwrap.dedent.__doc__ or "").split("\n\n")[0]
    assert answers == [" ".join(paragraph.split())]


def test_every_chat_can_be_encoded(split: ChatSplit, encoder: ChatEncoder) -> None:
    chats = split.train[::10] + split.heldout
    assert [item for item in encoder.encode(chats) if isinstance(item, Skip)] == []


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


def test_rows_are_written_as_lines(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "ä\n\u2028"}]}, {"messages": []}]
    write_jsonl(rows, tmp_path / "folder" / "chats.jsonl")
    lines = (tmp_path / "folder" / "chats.jsonl").read_bytes().splitlines()
    assert [json.loads(line) for line in lines] == rows
