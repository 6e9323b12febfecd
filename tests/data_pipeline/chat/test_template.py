"""The packaged template in transformers' hands, and finding a tokenizer's own template."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conf.system.errors import UserError
from data_pipeline.chat.template import CHATML, CHATML_PATH, load_chat_template, read_template_tokens


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **settings: Any) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    assert isinstance(text, str)
    return text


def test_a_chat_renders_as_chatml(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert render(chat_tokenizer, messages) == turns + "<|im_start|>assistant\nHello<|im_end|>\n"
    assert render(chat_tokenizer, messages[:2], add_generation_prompt=True) == turns + "<|im_start|>assistant\n"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_thinking_stands_before_the_response(chat_tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    text = render(chat_tokenizer, [{"role": "assistant", "content": "2", key: "one and one"}])
    assert text == "<|im_start|>assistant\n<think>\none and one\n</think>\n\n2<|im_end|>\n"


def test_tool_calls_are_json_and_tool_responses_share_a_user_turn(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    call = {"function": {"name": "add", "arguments": {"a": "ö<"}}}
    messages = [
        {"role": "assistant", "content": "Wait.", "tool_calls": [call, {"name": "sub", "arguments": '{"b":1}'}]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
    ]
    assert render(chat_tokenizer, messages) == (
        '<|im_start|>assistant\nWait.\n<tool_call>\n{"name": "add", "arguments": {"a": "ö<"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "sub", "arguments": {"b":1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
    )


def test_white_space_of_texts_stays(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    text = render(chat_tokenizer, [{"role": "user", "content": "\n a \n\n"}])
    assert text == "<|im_start|>user\n\n a \n\n<|im_end|>\n"


def test_an_unknown_role_and_tools_are_refused_not_ignored(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TemplateError, match="Unknown role bot"):
        render(chat_tokenizer, [{"role": "bot", "content": "x"}])
    with pytest.raises(TemplateError, match="system message"):
        render(chat_tokenizer, [{"role": "user", "content": "x"}], tools=[{"name": "add"}])


def test_a_tokenizer_s_own_template_is_the_one_transformers_saves(base_tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_tokenizer_dir)
    tokenizer.chat_template = "{{ messages }}ä\n"
    tokenizer.save_pretrained(tmp_path)
    assert load_chat_template(tmp_path, None) == AutoTokenizer.from_pretrained(tmp_path).chat_template


@pytest.mark.parametrize("entry", ["T", [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "T"}]])
def test_older_tokenizers_keep_the_template_in_their_config(
    base_tokenizer_dir: Path, tmp_path: Path, entry: object
) -> None:
    directory = shutil.copytree(base_tokenizer_dir, tmp_path / "tokenizer")
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": entry}))
    assert load_chat_template(directory, None) == "T"
    (directory / "chat_template.jinja").write_text("file")
    assert load_chat_template(directory, None) == "file"


def test_a_template_can_be_named_or_given_as_a_file(base_tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("mine")
    assert load_chat_template(base_tokenizer_dir, CHATML) == CHATML_PATH.read_text(encoding="utf-8")
    assert load_chat_template(base_tokenizer_dir, str(tmp_path / "mine.jinja")) == "mine"


def test_a_missing_template_says_what_to_give(base_tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no chat template.*data.prepare.chat_template=chatml"):
        load_chat_template(base_tokenizer_dir, None)
    with pytest.raises(UserError, match=r"cannot read.*nowhere.jinja.*No such file"):
        load_chat_template(base_tokenizer_dir, str(tmp_path / "nowhere.jinja"))
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load_chat_template(base_tokenizer_dir, str(tmp_path / "binary.jinja"))


def test_templates_get_the_tokens_transformers_gives_them(base_tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_tokenizer_dir)
    assert read_template_tokens(base_tokenizer_dir) == tokenizer.special_tokens_map


def test_the_saved_tokenizer_has_the_chat_tokens_as_added_special_tokens(base_tokenizer_dir: Path) -> None:
    added = json.loads((base_tokenizer_dir / "tokenizer.json").read_text())["added_tokens"]
    special = {token["content"]: token["id"] for token in added if token["special"]}
    expected = {"<|im_start|>": 10, "<|im_end|>": 11, "<think>": 12, "</think>": 13, "<SPECIAL_100>": 100}
    assert {text: special.get(text) for text in expected} == expected
