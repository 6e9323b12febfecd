"""Lines of .jsonl files are recognised as prompts, and located (their tokens: evaluate/test_prompts.py)."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.system.errors import UserError
from data_pipeline.chat.template import load_chat_template
from data_pipeline.toy.tokenizer import train_tokenizer
from model.commands.prompt_records import encode_prompt_record, lacks_response, read_prompt_records
from tests.helpers.tiny_exports import TEXT, VOCAB_SIZE

QUESTION = {"role": "user", "content": "Why?"}
RESPONSE = {"role": "assistant", "content": "Because."}


def test_a_line_ends_at_a_line_feed_alone_and_blank_ones_count(tmp_path: Path) -> None:
    first = json.dumps({"prompt": "one\u2028line\x0b\x85"}, ensure_ascii=False)
    (tmp_path / "prompts.jsonl").write_bytes(f"\ufeff{first}\r\n\r\n".encode() + b'{"prompt": "two"}')
    assert list(read_prompt_records(tmp_path / "prompts.jsonl")) == [
        (f"{tmp_path}/prompts.jsonl:1", {"prompt": "one\u2028line\x0b\x85"}),
        (f"{tmp_path}/prompts.jsonl:3", {"prompt": "two"}),
    ]


def test_records_are_read_lazily(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "fine"}\nbroken')
    assert next(read_prompt_records(tmp_path / "prompts.jsonl"))[1] == {"prompt": "fine"}


def test_messages_win_over_what_repeats_them(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([TEXT], VOCAB_SIZE)
    tokenizer.chat_template = load_chat_template(tmp_path, "chatml")
    record = {"messages": [QUESTION]}
    both = record | {"prompt": "Why?", "text": "Why? Because."}
    expected = encode_prompt_record(record, "here:1", tokenizer, prompt_tokens=3)
    assert encode_prompt_record(both, "here:1", tokenizer, prompt_tokens=3) == expected


def test_tools_go_to_the_chat_template_or_are_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([TEXT], VOCAB_SIZE)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]

    def encode(tools: Any) -> list[int]:
        record = {"messages": [QUESTION], "tools": tools}
        return encode_prompt_record(record, "here:1", tokenizer, prompt_tokens=3).token_ids

    tokenizer.chat_template = load_chat_template(tmp_path, "chatml")
    plain = encode(None)
    assert encode([]) == encode("") == plain
    with pytest.raises(UserError, match=r"here:1: the checkpoint's chat template rejects the messages.*no tools"):
        encode(tools)
    tokenizer.chat_template = "{{ tools | tojson if tools }}{{ messages[0]['content'] }}"
    assert encode(tools) == encode(json.dumps(tools)) != encode(None)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="does not write tools: describe them in a message"):
        encode(tools)
    for wrong, message in (("{", "is text that is no JSON"), ({"name": "add"}, "must be a list of objects")):
        with pytest.raises(UserError, match=f'here:1: "tools" {message}'):
            encode(wrong)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "Why?"}, True),
        ({"messages": [QUESTION]}, True),
        ({"messages": [QUESTION, RESPONSE, QUESTION]}, True),
        ({"messages": [QUESTION, RESPONSE], "prompt": "Why?"}, False),
        ({"messages": [QUESTION], "text": "Why?"}, True),
        ({"text": "Why?", "prompt": "Why?"}, False),
        ({"messages": []}, False),
        ({"question": "Why?"}, False),
    ],
)
def test_a_record_that_lacks_a_response_is_recognised(record: dict[str, Any], expected: bool) -> None:
    assert lacks_response(record) is expected
