"""Checks what an export with images has beside a text model's: tokens, a template that places them, a processor."""

import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from model.convert.processor_config import read_image_settings
from model.convert.vision_config import read_vision_config
from model.export.images import check_image_tokens_named, load_image_processor
from model.export.shipped_code import CONFIG_NAME, IMAGE_PROCESSOR_MAP, PROCESSOR_CONFIG_NAME, PROCESSOR_MAP
from model.hf.image_tokens import IMAGE_START, IMAGE_TOKENS
from model.verify_export.check import ExportCheck

CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Name it."}, {"type": "image"}]}]
WRITE = "write <|image_start|> into texts, or put a template for images there"
COPY = "copy it from an export of python -m model.convert"


def check_vision_tokens(directory: Path, tokenizer: PreTrainedTokenizerFast) -> ExportCheck:
    """Check the four tokens of images, and that a chat template writes one <|image_start|> for each image."""
    name = "image tokens"
    try:
        check_image_tokens_named(directory, tokenizer)
    except UserError as error:
        return ExportCheck.failed(name, str(error))
    ids = ", ".join(f"{number} {token}" for token, number in IMAGE_TOKENS.items())
    if not tokenizer.chat_template:
        return ExportCheck.passed(name, ids)
    try:
        with warnings.catch_warnings(action="ignore"):
            tokens: Any = tokenizer.apply_chat_template(CHAT, return_dict=True)  # pyright: ignore[reportArgumentType]
        found = list(tokens["input_ids"]).count(IMAGE_START)
    except Exception as error:  # a template may raise anything
        return ExportCheck.warned(
            name, f"the chat template refuses images: {error}", "write <|image_start|> into texts"
        )
    if found != 2:
        return ExportCheck.warned(name, f"the chat template writes {found} <|image_start|> for two images", WRITE)
    return ExportCheck.passed(name, f"{ids}; the chat template writes one for each image")


def check_processor(directory: Path, config: dict[str, Any]) -> ExportCheck:
    """Check that AutoProcessor finds its classes, and that images become what the tower takes."""
    name, path = "processor", directory / PROCESSOR_CONFIG_NAME

    def read() -> str:
        values = read_json_object(path, f"there is no {PROCESSOR_CONFIG_NAME}: AutoProcessor needs it; {COPY}")
        nested = values.get("image_processor")
        images = nested if isinstance(nested, dict) else {}
        expected = ((values, PROCESSOR_MAP), (images, IMAGE_PROCESSOR_MAP))
        if any(
            (part.get("auto_map") or {}).get(key) != value for part, names in expected for key, value in names.items()
        ):
            raise UserError(f"{PROCESSOR_CONFIG_NAME} names other classes than the shipped ones: {COPY}")
        read_image_settings(directory, read_vision_config(config, directory / CONFIG_NAME))
        processor = load_image_processor(directory)
        return f"images by {processor.rules}'s rules, at most {processor.longest_edge} pixels long"

    return ExportCheck.of_action(name, read)
