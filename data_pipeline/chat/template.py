"""Find the chat template that is to be used, and the tokens of the tokenizer that a template can write."""

from pathlib import Path
from typing import Any

from conf.system.errors import UserError
from conf.system.json_file import read_optional_json

CHATML = "chatml"
CHATML_PATH = Path(__file__).with_name("chatml.jinja")
CHATML_MARKERS = ("<|im_start|>", "<|im_end|>")
TEMPLATE_NAME = "chat_template.jinja"
# How chatml writes a part of a message's content, and how it does for models that read images.
TEXT_PART = "{{- part['text'] -}}"
IMAGE_OR_TEXT_PART = "{{- '<|image_start|>' if part['type'] in ('image', 'image_url') else part['text'] -}}"
# What transformers passes to a template in addition to the messages (PreTrainedTokenizerBase.special_tokens_map).
TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_chat_template(tokenizer_dir: Path | str, chat_template: str | None) -> str:
    """Return the text of a template. chat_template: as data.prepare.chat_template: null, `chatml`, or a path.

    Raises UserError if there is none, or the file cannot be read.
    """
    if chat_template is None:
        return _own_template(Path(tokenizer_dir))
    return _read_text(CHATML_PATH if chat_template == CHATML else Path(chat_template))


def load_image_chat_template(tokenizer_dir: Path | str, chat_template: str | None) -> str:
    """Return the text of a template as load_chat_template does; chatml writes <|image_start|> for an image.

    Raises UserError as load_chat_template does.
    """
    template = load_chat_template(tokenizer_dir, chat_template)
    if chat_template != CHATML:
        return template
    assert TEXT_PART in template
    return template.replace(TEXT_PART, IMAGE_OR_TEXT_PART)


def describe_chat_template(tokenizer_dir: Path | str, chat_template: str | None) -> str:
    """Return what error messages call the template."""
    if chat_template is None:
        return f"the chat template of the tokenizer in {tokenizer_dir}"
    return f"the chat template {chat_template}"


def read_template_tokens(tokenizer_dir: Path | str) -> dict[str, str]:
    """Return the texts of the special tokens that templates refer to by name ({"bos_token": "<s>", ...})."""
    config = _read_config(Path(tokenizer_dir))
    texts = {name: _text_of_token(config.get(name)) for name in TEMPLATE_TOKENS}
    return {name: text for name, text in texts.items() if text is not None}


def _own_template(tokenizer_dir: Path) -> str:
    """Return the template file of a tokenizer, else the entry of its tokenizer_config.json, as transformers does."""
    if (tokenizer_dir / TEMPLATE_NAME).is_file():
        return _read_text(tokenizer_dir / TEMPLATE_NAME)
    template = _read_config(tokenizer_dir).get("chat_template")
    if isinstance(template, list):  # several with names
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    if not isinstance(template, str):
        raise UserError(
            f"the tokenizer in {tokenizer_dir} has no chat template ({TEMPLATE_NAME}): use that of the model family "
            f"with data.prepare.chat_template={CHATML}, or give a jinja file"
        )
    return template


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot read the chat template {path} ({error.strerror}): data.prepare.chat_template is null (the "
            f"tokenizer's own), {CHATML}, or the path of a jinja file"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"the chat template {path} is not UTF-8 text ({error})") from None


def _read_config(tokenizer_dir: Path) -> dict[str, Any]:
    return read_optional_json(tokenizer_dir / "tokenizer_config.json")


def _text_of_token(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
