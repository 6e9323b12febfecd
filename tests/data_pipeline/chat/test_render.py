"""Cutting a rendered chat at its answers."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from data_pipeline.chat.messages import read_chat
from data_pipeline.chat.render import ChatRenderer
from data_pipeline.chat.reserved import find_reserved_tokens
from data_pipeline.chat.template import CHATML_PATH
from data_pipeline.prepare.encoders import Skip, load_tokenizer
from data_pipeline.tokenizer import MASK_TOKEN

CHATML_TEXT = CHATML_PATH.read_text(encoding="utf-8")
CHAT = [
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": "That.", "reasoning_content": "Hm."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So.", "tool_calls": [{"name": "add", "arguments": {}}]},
]


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(CHATML_TEXT, {})


def test_segments_are_what_transformers_renders_and_end_with_the_end_of_turn(
    chat: list[dict[str, Any]],
    renderer: ChatRenderer,
    base_tokenizer_dir: Path,
    chat_tokenizer: PreTrainedTokenizerBase,
) -> None:
    messages = read_chat(chat, find_reserved_tokens(load_tokenizer(base_tokenizer_dir), MASK_TOKEN))
    assert not isinstance(messages, Skip)
    segments = renderer.split(messages)
    assert not isinstance(segments, Skip)
    assert "".join(segments) + "\n" == chat_tokenizer.apply_chat_template(chat, tokenize=False)
    assert len(segments) == 2 * sum(message["role"] == "assistant" for message in chat)
    assert all(answer.endswith("<|im_end|>") for answer in segments[1::2])


def test_what_precedes_an_answer_is_the_prompt_decoding_starts_from(
    chat: list[dict[str, Any]], renderer: ChatRenderer, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    rendered = renderer.render([{k: v for k, v in message.items() if v is not None} for message in chat])
    places = [place for place, message in enumerate(chat) if message["role"] == "assistant"]
    for place, (start, _) in zip(places, rendered.answers, strict=True):
        prompt = "<|im_start|>assistant\n"  # transformers refuses an empty chat
        if place:
            prompt = chat_tokenizer.apply_chat_template(chat[:place], tokenize=False, add_generation_prompt=True)
        assert rendered.text[:start] == prompt


def test_a_template_can_name_special_tokens() -> None:
    template = "{{ bos_token }}" + CHATML_TEXT
    segments = ChatRenderer(template, {"bos_token": "<s>"}).split(CHAT)
    assert not isinstance(segments, Skip)
    assert segments[0] == "<s><|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("'<think>\\n' + thinking", "'<think>\\n'", "part of an answer not rendered by the chat template (thinking)"),
        ("message['tool_calls'] or []", "[]", "part of an answer not rendered by the chat template (tool calls)"),
        ("{{- content -}}\n            {%- for call", "{%- for call", "part of an answer not rendered"),
        ("message['role'] + '\\n' + text_of(message['content'])", "message['role'] + '\\n'", "message not rendered"),
        ("{%- generation -%}", "{{ 1 // 0 }}{%- generation -%}", "refused by the chat template (ZeroDivisionError"),
        ("{%- for message in messages -%}", "{%- for message in messages[:2] -%}", "answers not marked"),
    ],
)
def test_what_a_template_loses_is_said(old: str, new: str, reason: str) -> None:
    assert CHATML_TEXT.count(old) == 1
    assert str(ChatRenderer(CHATML_TEXT.replace(old, new), {}).split(CHAT)).startswith(reason)


def test_answers_that_touch_have_no_prompt_and_are_refused() -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    answers = [{"role": "assistant", "content": text} for text in "ab"]
    assert str(ChatRenderer(template, {}).split(answers)) == "answers not marked by the chat template"
