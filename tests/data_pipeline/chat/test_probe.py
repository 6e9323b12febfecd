"""Templates and tokenizers that cannot train a chat model are refused before the first row."""

import json
import shutil
from pathlib import Path

import pytest

from conf.system.errors import UserError
from data_pipeline.chat.encoder import build_chat_encoder
from data_pipeline.chat.template import CHATML_PATH
from data_pipeline.tokenizer import MASK_TOKEN

CHATML_TEXT = CHATML_PATH.read_text(encoding="utf-8")
LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
END = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

BAD_TEMPLATES = {
    "no marks": (LOOP + "{{ m.content }}<|im_end|>\n" + END, "does not mark the assistant's answers .found 0 of 2"),
    "last answer alone": (
        LOOP + "{% if loop.last %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}\n" + END,
        "found 1 of 2",
    ),
    "marks questions": (
        LOOP + "{% if m.role == 'user' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}"
        "{{ m.content }}<|im_end|>\n{% endif %}" + END,
        "does not mark the assistant's answers",
    ),
    "end of turn outside": (
        LOOP
        + "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n".join(["{% if m.role != 'user' %}", ""])
        + "{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
        + END,
        "does not end answers with one end-of-turn token",
    ),
    "newline inside": (CHATML_TEXT.replace("{{- '<|im_end|>' -}}", "{{- '<|im_end|>\\n' -}}"), "nothing after it"),
    "two ends of turn": (
        CHATML_TEXT.replace("{{- '<|im_end|>' -}}", "{{- '</s>' if loop.last else '<|im_end|>' -}}"),
        "does not end answers with one end-of-turn token",
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
    """A copy of a tokenizer whose chat markers are changed."""
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
