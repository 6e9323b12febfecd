"""Cutting a rendered chat at its responses.

Templates and tokenizers that cannot train a chat model are refused before the first record.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from conf.system.errors import UserError
from data_pipeline.chat.encoder import build_chat_encoder
from data_pipeline.chat.messages import find_reserved_tokens, read_chat
from data_pipeline.chat.render import ChatRenderer
from data_pipeline.chat.template import CHATML_PATH
from data_pipeline.encoder import Skip, load_tokenizer
from data_pipeline.toy.tokenizer import MASK_TOKEN

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
    assert all(response.endswith("<|im_end|>") for response in segments[1::2])


def test_what_precedes_a_response_is_the_prompt_decoding_starts_from(
    chat: list[dict[str, Any]], renderer: ChatRenderer, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    rendered = renderer.render([{k: v for k, v in message.items() if v is not None} for message in chat])
    places = [place for place, message in enumerate(chat) if message["role"] == "assistant"]
    for place, (start, _) in zip(places, rendered.responses, strict=True):
        prompt = "<|im_start|>assistant\n"  # transformers refuses an empty chat
        if place:
            prompt = chat_tokenizer.apply_chat_template(chat[:place], tokenize=False, add_generation_prompt=True)
        assert rendered.text[:start] == prompt


def test_tools_are_rendered_or_the_chat_is_refused() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert str(ChatRenderer(CHATML_TEXT, {}).split(CHAT, tools)).startswith("rejected by the chat template")
    head, loop = CHATML_TEXT.split("{%- for message in messages -%}", 1)
    without_check = head.split("{%- if tools -%}")[0] + "{%- for message in messages -%}" + loop
    assert str(ChatRenderer(without_check, {}).split(CHAT, tools)) == "tools not rendered by the chat template (add)"
    segments = ChatRenderer("{{ tools | tojson }}" + without_check, {}).split(CHAT, tools)
    assert not isinstance(segments, Skip)
    assert segments[0].startswith('[{"type": "function", "function": {"name": "add"')


def test_a_template_can_name_special_tokens() -> None:
    template = "{{ bos_token }}" + CHATML_TEXT
    segments = ChatRenderer(template, {"bos_token": "<s>"}).split(CHAT)
    assert not isinstance(segments, Skip)
    assert segments[0] == "<s><|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("'<think>\\n' + thinking", "'<think>\\n'", "part of a response not rendered by the chat template (thinking)"),
        ("message['tool_calls'] or []", "[]", "part of a response not rendered by the chat template (tool calls)"),
        ("{{- content -}}\n            {%- for call", "{%- for call", "part of a response not rendered"),
        ("message['role'] + '\\n' + text_of(message['content'])", "message['role'] + '\\n'", "message not rendered"),
        ("{%- generation -%}", "{{ 1 // 0 }}{%- generation -%}", "rejected by the chat template (ZeroDivisionError"),
        ("{%- for message in messages -%}", "{%- for message in messages[:2] -%}", "responses not marked"),
    ],
)
def test_what_a_template_loses_is_said(old: str, new: str, reason: str) -> None:
    assert CHATML_TEXT.count(old) == 1
    assert str(ChatRenderer(CHATML_TEXT.replace(old, new), {}).split(CHAT)).startswith(reason)


def test_responses_that_touch_have_no_prompt_and_are_refused() -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    responses = [{"role": "assistant", "content": text} for text in "ab"]
    assert str(ChatRenderer(template, {}).split(responses)) == "responses not marked by the chat template"


LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
END = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

BAD_TEMPLATES = {
    "no marks": (LOOP + "{{ m.content }}<|im_end|>\n" + END, "does not mark the assistant's responses .found 0 of 2"),
    "last response alone": (
        LOOP + "{% if loop.last %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}\n" + END,
        "found 1 of 2",
    ),
    "marks questions": (
        LOOP + "{% if m.role == 'user' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}"
        "{{ m.content }}<|im_end|>\n{% endif %}" + END,
        "does not mark the assistant's responses",
    ),
    "end of turn outside": (
        LOOP
        + "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n".join(["{% if m.role != 'user' %}", ""])
        + "{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
        + END,
        "does not end responses with one end-of-turn token",
    ),
    "newline inside": (CHATML_TEXT.replace("{{- '<|im_end|>' -}}", "{{- '<|im_end|>\\n' -}}"), "nothing after it"),
    "two ends of turn": (
        CHATML_TEXT.replace("{{- '<|im_end|>' -}}", "{{- '</s>' if loop.last else '<|im_end|>' -}}"),
        "does not end responses with one end-of-turn token",
    ),
    "other prompt": (
        CHATML_TEXT.replace("prompt -%}\n    {{- '<|im_start|>assistant\\n'", "prompt -%}{{- '<|im_start|>a: '"),
        "other prompts than training",
    ),
    "syntax error": ("{% for m in %}", "cannot render a chat .TemplateSyntaxError"),
    "fails": ("{{ raise_exception('only poems') }}", "cannot render a chat .TemplateError: only poems"),
    "date": (CHATML_TEXT + "{{ strftime_now('%d') }}", "today's date"),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_an_unfit_template_is_refused(name: str, base_tokenizer_dir: Path, tmp_path: Path) -> None:
    text, message = BAD_TEMPLATES[name]
    path = tmp_path / "bad.jinja"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        build_chat_encoder(base_tokenizer_dir, MASK_TOKEN, str(path))
    assert str(path) in str(error.value)


def test_a_small_template_with_marks_is_enough(base_tokenizer_dir: Path, tmp_path: Path) -> None:
    body = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    path = tmp_path / "good.jinja"
    path.write_text(LOOP + body + "{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}" + END)
    assert build_chat_encoder(base_tokenizer_dir, MASK_TOKEN, str(path)).block_padding_token_id == 11


def rename_tokens(source: Path, target: Path, **changes: object) -> Path:
    """Copy a tokenizer and change its chat markers."""
    shutil.copytree(source, target)
    path = target / "tokenizer.json"
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        if token["content"] in ("<|im_start|>", "<|im_end|>"):
            old = token["content"]
            token.update(changes)
            content["model"]["vocab"][token["content"]] = content["model"]["vocab"].pop(old)
            if "content" in changes:
                break
    path.write_text(json.dumps(content))
    return target


def test_a_base_tokenizer_without_the_markers_is_refused(base_tokenizer_dir: Path, tmp_path: Path) -> None:
    directory = rename_tokens(base_tokenizer_dir, tmp_path / "renamed", content="<SPECIAL_10>x")
    with pytest.raises(UserError, match=r"writes <\|im_start\|>, which the tokenizer does not have as special"):
        build_chat_encoder(directory, MASK_TOKEN, "chatml")


def test_markers_that_are_no_special_tokens_are_refused(base_tokenizer_dir: Path, tmp_path: Path) -> None:
    directory = rename_tokens(base_tokenizer_dir, tmp_path / "ordinary", special=False)
    with pytest.raises(UserError, match=r"<\|im_start\|> and <\|im_end\|>, which the tokenizer does not have"):
        build_chat_encoder(directory, MASK_TOKEN, "chatml")


def test_a_directory_without_a_tokenizer_or_mask_token_is_refused(base_tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        build_chat_encoder(tmp_path, MASK_TOKEN, "chatml")
    with pytest.raises(UserError, match="no mask token '<nix>'"):
        build_chat_encoder(base_tokenizer_dir, "<nix>", "chatml")
