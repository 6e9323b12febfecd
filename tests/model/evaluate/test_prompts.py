"""Records of .jsonl files become token ids, or a message with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from conf.system.errors import UserError
from data_pipeline.chat.template import load_chat_template
from data_pipeline.toy.tokenizer import train_tokenizer
from model.evaluate.prompts import EvaluationPrompt, check_masks, check_room, make_batches, read_prompts
from tests.helpers.tiny_exports import TEXT, VOCAB_SIZE


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer([TEXT], VOCAB_SIZE)
    tokenizer.chat_template = load_chat_template(tmp_path_factory.mktemp("template"), "chatml")
    return tokenizer


def write(path: Path, *records: Any) -> Path:
    path.write_text(
        "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records), encoding="utf-8"
    )
    return path


def read(tokenizer: PreTrainedTokenizerFast, *paths: Path, **options: Any) -> list[Any]:
    given: dict[str, Any] = {"prompt_tokens": 5} | options
    return read_prompts(paths, tokenizer, **given)


def test_the_three_kinds_of_records(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": "Why?"}]
    path = write(
        tmp_path / "records.jsonl",
        {"prompt": "<|im_start|>the sea"},
        "",
        {"text": "<|im_start|>the sea is wide and blue"},
        {"messages": chat},
        {"messages": [*chat, {"role": "assistant", "content": "Because."}], "group": "chats"},
    )
    prompt, text, asked, answered = read(tokenizer, path)
    assert prompt.token_ids[0] == 10
    assert tokenizer.decode(prompt.token_ids[1:]) == "the sea"
    assert len(text.token_ids) == 5
    assert "<|im_start|>the sea".startswith(str(tokenizer.decode(text.token_ids)))
    assert 10 not in text.token_ids  # training data spell reserved tokens as text, too
    assert tokenizer.decode(asked.token_ids) == tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )
    assert answered.token_ids == asked.token_ids
    assert [p.group for p in (prompt, text, asked, answered)] == ["records"] * 3 + ["chats"]
    assert text.place == f"{path}:3"


def test_a_limit_takes_the_first_of_each_group(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    records = [{"prompt": f"number {i}", "group": "ab"[i % 2]} for i in range(6)]
    first, second = write(tmp_path / "first.jsonl", *records), write(tmp_path / "second.jsonl", {"prompt": "more"})
    prompts = read(tokenizer, first, second, limit=2)
    assert [p.group for p in prompts] == ["a", "b", "a", "b", "second"]
    assert tokenizer.decode(prompts[2].token_ids) == "number 2"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"records\.jsonl:2 is not JSON"),
        ("[1]", r"records\.jsonl:2 is not a JSON object but list"),
        ({"question": "Why?"}, r"records\.jsonl:2 has none of prompt, messages, text"),
        ({"prompt": "a", "text": "b"}, r"has prompt and text of"),
        ({"prompt": 3}, r'"prompt" must be text, not int'),
        ({"prompt": " \n"}, r'"prompt" is empty'),
        ({"text": ""}, r'"text" is empty'),
        ('{"text": "\\ud800"}', r"is not valid UTF-8"),
        ({"prompt": "a", "answer": {"b": 1}}, r'"answer" must be text, a number or a list of those'),
        ({"prompt": "a", "answer": []}, r'"answer" must be text, a number or a list of those'),
        ({"prompt": "a", "answer": True}, r'"answer" must be text, a number or a list of those, not True'),
        ({"prompt": "a", "answer": ["b", " "]}, r'"answer" must be text, a number or a list of those'),
        ({"prompt": "a", "group": 1}, r'"group" must be a name, not 1'),
        ({"messages": "Why?"}, r'"messages" must be a list'),
        ({"messages": [{"role": "user"}]}, r'"messages" must be a list of objects with role and content'),
        ({"messages": []}, r'"messages" contains nothing to respond to'),
        ({"messages": [{"role": "assistant", "content": "No."}]}, r'"messages" contains nothing to respond to'),
        ({"messages": [{"role": "user", "content": ""}]}, r"content of the last message is empty"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: Any, message: str) -> None:
    path = write(tmp_path / "records.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(UserError, match=message):
        read(tokenizer, path)


def test_answers_are_one_or_several_texts_or_numbers(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    answers = ("four", 4, ["four", 4, 4.5], None)
    path = write(tmp_path / "records.jsonl", *({"prompt": "two and two", "answer": answer} for answer in answers))
    assert [p.answers for p in read(tokenizer, path)] == [("four",), ("4",), ("four", "4", "4.5"), None]


def test_batches_hold_prompts_of_one_group_in_their_order() -> None:
    prompts = [EvaluationPrompt([1], group, str(number)) for number, group in enumerate("abaaba")]
    batches = make_batches(prompts, 2)
    assert [[(p.group, p.place) for p in batch] for batch in batches] == [
        [("a", "0"), ("a", "2")],
        [("b", "1"), ("b", "4")],
        [("a", "3"), ("a", "5")],
    ]
    assert make_batches(prompts, 1) == [[prompt] for prompt in prompts]


def test_a_prompt_with_a_mask_token_is_named() -> None:
    check_masks([EvaluationPrompt([1, 2], "a", "here:1")], 100)
    with pytest.raises(UserError, match=r"here:2: the prompt contains the mask token \(id 100\)"):
        check_masks([EvaluationPrompt([1, 2], "a", "here:1"), EvaluationPrompt([1, 100], "a", "here:2")], 100)


def test_no_prompts_are_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"no prompts in .*records\.jsonl"):
        read(tokenizer, write(tmp_path / "records.jsonl", ""))
    for missing in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(UserError, match="is not a file"):
            read(tokenizer, missing)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8"):
        read(tokenizer, tmp_path / "binary")


def test_a_refusing_or_missing_template_is_named(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([TEXT], VOCAB_SIZE)
    path = write(tmp_path / "records.jsonl", {"messages": [{"role": "user", "content": "Why?"}]})
    with pytest.raises(UserError, match="has no chat template"):
        read(tokenizer, path)
    tokenizer.chat_template = "{{ raise_exception('system first') }}"
    with pytest.raises(UserError, match=r"records\.jsonl:1: .* rejects the messages: system first"):
        read(tokenizer, path)


def test_a_prompt_longer_than_the_context_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = read(tokenizer, write(tmp_path / "records.jsonl", {"prompt": "a"}, {"prompt": "the sea " * 9}))
    length = len(prompts[1].token_ids)
    check_room(prompts, 10, length + 10)
    with pytest.raises(UserError, match=rf"records\.jsonl:2: the prompt has {length} tokens; with 11 new ones"):
        check_room(prompts, 11, length + 10)
