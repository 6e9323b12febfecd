"""The four tokens of images in a tokenizer: checked, or given their names when a text model gets a vision tower.

Their ids are reserved tokens in the tokenizers of this family, which the text model never reads.
"""

import json
from pathlib import Path
from typing import Any

from conf.system.atomic import atomic_write_text
from conf.system.errors import UserError
from conf.system.json_file import read_json_object, read_optional_json
from conf.tokenizer_info import read_token_ids
from model.convert.hf_target import (
    CHAT_TEMPLATE_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_FILES,
    TOKENIZER_NAME,
    read_tokenizer_config,
)
from model.hf.image_tokens import IMAGE_BREAK, IMAGE_END, IMAGE_PAD, IMAGE_TOKENS

# Ministral 3's tokens of images, whose trained embeddings ours begin with: their ids are ChatML's in our tokenizers.
MINISTRAL_TOKENS = {"[IMG]": IMAGE_PAD, "[IMG_BREAK]": IMAGE_BREAK, "[IMG_END]": IMAGE_END}
# Puts one <|image_start|> for each image into the text of a message, before a template for text reads it.
TEMPLATE_PRELUDE = """\
{#- Content may be a list of parts: an image becomes <|image_start|>, a text stays as it is. -#}
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message['content'] is string or not message['content'] -%}
        {%- set flat.messages = flat.messages + [message] -%}
    {%- else -%}
        {%- set flat.text = '' -%}
        {%- for part in message['content'] -%}
            {%- set is_image = part['type'] in ('image', 'image_url') -%}
            {%- set flat.text = flat.text + ('<|image_start|>' if is_image else part['text']) -%}
        {%- endfor -%}
        {%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def check_image_vocabulary(directory: Path) -> None:
    """Refuse a tokenizer without the four tokens of images at their ids. Raises: UserError."""
    ids = read_token_ids(directory)
    for token, token_id in IMAGE_TOKENS.items():
        if ids.get(token) != token_id:
            raise UserError(
                f"the tokenizer in {directory} has no {token} with id {token_id}, but the model reads images: it "
                "belongs to another model"
            )


def find_trained_embeddings(directory: Path) -> dict[int, int]:
    """Return which row of a Ministral 3 embedding each of our image tokens begins with; {} if it names no such tokens.

    Raises: UserError if the tokenizer cannot be read.
    """
    ids = read_token_ids(directory) if (directory / TOKENIZER_NAME).is_file() else {}
    return (
        {ours: ids[token] for token, ours in MINISTRAL_TOKENS.items()} if ids.keys() >= MINISTRAL_TOKENS.keys() else {}
    )


def name_image_tokens(directory: Path) -> None:
    """Give ids 18 to 21 of a tokenizer the names of image tokens, and let its chat template write one for each image.

    The tokenizer's files in `directory` are rewritten.

    Raises:
        UserError: one of the ids is a word of the vocabulary or stands in the chat template, or a name is taken.
    """
    content = read_json_object(directory / TOKENIZER_NAME, f"{directory} has no {TOKENIZER_NAME}")
    reserved = {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    ids, renamed = read_token_ids(directory), dict[str, str]()
    for token, token_id in IMAGE_TOKENS.items():
        if ids.get(token, token_id) != token_id:
            raise UserError(f"the tokenizer in {directory} has {token} as id {ids[token]}, not {token_id}: rename it")
        if token_id not in reserved:
            raise UserError(
                f"id {token_id} of the tokenizer in {directory} is no reserved (added) token: images need {token} there"
            )
        if reserved[token_id] != token:
            renamed[reserved[token_id]] = token
    _adapt_template(directory, renamed)
    for name in TOKENIZER_FILES if renamed else ():
        values = read_optional_json(directory / name) if name.endswith(".json") else {}
        if (new := _rename(values, renamed)) != values:
            _write(directory / name, new)


def _rename(value: Any, renamed: dict[str, str]) -> Any:
    """Rename tokens in a JSON value: keys, and texts that are one as a whole."""
    if isinstance(value, dict):
        return {renamed.get(key, key): _rename(part, renamed) for key, part in value.items()}
    if isinstance(value, list):
        return [_rename(part, renamed) for part in value]
    return renamed.get(value, value) if isinstance(value, str) else value


def _adapt_template(directory: Path, renamed: dict[str, str]) -> None:
    """Let the chat template, wherever it stands, read content with images."""
    path, config = directory / CHAT_TEMPLATE_NAME, read_tokenizer_config(directory)
    template = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if not isinstance(template, str):
        return
    if used := [token for token in renamed if token in template]:
        raise UserError(
            f"the chat template in {directory} writes {used[0]}, whose id images need: use one that does not"
        )
    if next(iter(IMAGE_TOKENS)) not in template:
        atomic_write_text(path, TEMPLATE_PRELUDE.rstrip("\n") + template)
        if config.pop("chat_template", None) is not None:
            _write(directory / TOKENIZER_CONFIG_NAME, config)


def _write(path: Path, values: dict[str, Any]) -> None:
    """Write a file of the tokenizer; its entries stay in their order."""
    atomic_write_text(path, json.dumps(values, ensure_ascii=False, indent=2) + "\n")
