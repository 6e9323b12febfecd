"""Images of prompts: opened and prepared as an export's processor does it, with this repository's classes."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from conf.system.errors import UserError
from conf.system.json_file import read_optional_json
from model.export.load import read_model_type
from model.export.shipped_code import PROCESSOR_CONFIG_NAME, VLM_TYPE
from model.hf.image_processing_nemotron_labs_diffusion_vlm import NemotronLabsDiffusionVLMImageProcessor, stack_images
from model.hf.image_tokens import IMAGE_TOKENS, Grid

SETTINGS = ("longest_edge", "rules")  # of the image processor


@dataclass(frozen=True)
class PromptImage:
    """One image of a prompt.

    Attributes:
        source: the picture (see load_image), or a function that returns it.
        grid: its features, height and width.
        processor: turns it into pixels.
    """

    source: Any
    grid: Grid
    processor: NemotronLabsDiffusionVLMImageProcessor

    def load(self) -> Tensor:
        """Return its pixels [3, H, W], prepared anew: those of many prompts would not fit into memory."""
        source: Any = self.source() if callable(self.source) else self.source
        return self.processor(source)["pixel_values"][0]

    def hash(self) -> str:
        """Return the hexadecimal SHA-256 of what decides its pixels: the file's bytes, or the text, and the rules."""
        source = self.source.read_bytes() if isinstance(self.source, Path) else str(self.source).encode()
        rules = f"{self.processor.longest_edge} {self.processor.rules} ".encode()
        return hashlib.sha256(rules + source).hexdigest()


class ImageReader:
    """Opens the images of prompts for one export."""

    def __init__(self, processor: NemotronLabsDiffusionVLMImageProcessor):
        """Store the export's image processor."""
        self._processor = processor

    def __call__(self, source: Any) -> PromptImage:
        """Open a picture, to see that it can be read and how many features it has. Raises: ValueError."""
        (grid,) = self._processor.list_grids(self._processor(source)["image_sizes"])
        return PromptImage(source, grid, self._processor)


def load_image_reader(directory: Path, tokenizer: PreTrainedTokenizerFast) -> ImageReader | None:
    """Return what opens images for an export; None for one that reads text alone.

    Raises: UserError if its tokenizer lacks the tokens of images, or its processor has settings that it cannot have.
    """
    if read_model_type(directory) != VLM_TYPE:
        return None
    check_image_tokens_named(directory, tokenizer)
    return ImageReader(load_image_processor(directory))


def check_image_tokens_named(directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer without the four tokens of images at their ids. Raises: UserError."""
    vocabulary = tokenizer.get_vocab()
    for token, token_id in IMAGE_TOKENS.items():
        if vocabulary.get(token) != token_id:
            raise UserError(
                f"the tokenizer in {directory} has no {token} with id {token_id}, but the model reads images: put the "
                "tokenizer there that it was trained with"
            )


def load_image_processor(directory: Path) -> NemotronLabsDiffusionVLMImageProcessor:
    """Build the image processor of an export. Raises: UserError for settings that it cannot have."""
    path = directory / PROCESSOR_CONFIG_NAME
    values = read_optional_json(path).get("image_processor") or {}
    try:
        return NemotronLabsDiffusionVLMImageProcessor(**{key: values[key] for key in SETTINGS if key in values})
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be used: {error}") from None


def load_pixels(images: Iterable[PromptImage]) -> dict[str, Tensor]:
    """Return pixel_values and image_sizes of images in their order, as the model takes them; {} without any."""
    pixels = [image.load() for image in images]
    return stack_images(pixels) if pixels else {}
