"""Lines of .jsonl files: which of them are prompts and where they stand (their tokens: evaluation/test_prompts.py)."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.chat.template import load_chat_template
from data_pipeline.tokenizer import train_tokenizer
from model.export.prompt_rows import encode_row, lacks_answer, read_rows
from tests.helpers.tiny_exports import TEXT, VOCAB_SIZE

QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}


def test_a_line_ends_at_a_line_feed_alone_and_blank_ones_count(tmp_path: Path) -> None:
    first = json.dumps({"prompt": "one\u2028line\x0b\x85"}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_bytes(f"\ufeff{first}\r\n\r\n".encode() + b'{"prompt": "two"}')
    assert list(read_rows(tmp_path / "rows.jsonl")) == [
        (f"{tmp_path}/rows.jsonl:1", {"prompt": "one\u2028line\x0b\x85"}),
        (f"{tmp_path}/rows.jsonl:3", {"prompt": "two"}),
    ]


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "fine"}\nbroken')
    assert next(read_rows(tmp_path / "rows.jsonl"))[1] == {"prompt": "fine"}


def test_messages_count_beside_what_repeats_them(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([TEXT], VOCAB_SIZE)
    tokenizer.chat_template = load_chat_template(tmp_path, "chatml")
    row = {"messages": [QUESTION]}
    both = row | {"prompt": "Why?", "text": "Why? Because."}
    expected = encode_row(row, "here:1", tokenizer, prompt_tokens=3)
    assert encode_row(both, "here:1", tokenizer, prompt_tokens=3) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Why?"}, True),
        ({"messages": [QUESTION]}, True),
        ({"messages": [QUESTION, ANSWER, QUESTION]}, True),
        ({"messages": [QUESTION, ANSWER], "prompt": "Why?"}, False),
        ({"messages": [QUESTION], "text": "Why?"}, True),
        ({"text": "Why?", "prompt": "Why?"}, False),
        ({"messages": []}, False),
        ({"question": "Why?"}, False),
    ],
)
def test_a_row_that_lacks_an_answer_is_told_from_others(row: dict[str, Any], expected: bool) -> None:
    assert lacks_answer(row) is expected
