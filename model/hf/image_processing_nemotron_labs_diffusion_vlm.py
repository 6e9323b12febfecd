"""Turns pictures into what the vision tower reads, by the rules that the released models were trained with.

They are mistral-common's: the longest edge is at most 1400 pixels, both sides then go up to multiples of 28, and the
picture is resized by bicubic interpolation without antialiasing. transformers' Pixtral rules are there to compare with.
"""

import base64
import binascii
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image as load_from_address

from .image_tokens import Grid

RULES = MISTRAL, TRANSFORMERS = "mistral", "transformers"
LONGEST_EDGE = 1400  # pixels
PIXELS_PER_FEATURE = 28  # a patch is 14 pixels wide, a feature 2 patches
MEAN = (0.48145466, 0.4578275, 0.40821073)  # red, green, blue
STD = (0.26862954, 0.26130258, 0.27577711)

Source = Any  # a PIL image, an array [height, width, 3] of bytes, a path, an address, bytes, or base64 text


def load_image(source: Source) -> Image.Image:
    """Open a picture in RGB: turned as its EXIF data say, transparency over white, the first frame of several.

    source: a PIL image, a uint8 array [H, W] or [H, W, 3 or 4], a path, bytes, base64 text (also as a data: address),
    or an http(s) address.

    Raises:
        ValueError: it cannot be read as a picture.
    """
    try:
        image = _open(source)
        image = ImageOps.exif_transpose(image)
        return _convert_to_rgb(image)
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError, binascii.Error) as error:
        name = f"{source!r}"
        name = name if len(name) <= 80 else f"{name[:77]}..."
        raise ValueError(f"the image {name} cannot be read: {error}") from None


def fit_grid(width: int, height: int, longest_edge: int = LONGEST_EDGE) -> Grid:
    """Return the features (height, width) of a picture of `width` x `height` pixels, as mistral-common counts them."""
    ratio = max(width, height) / longest_edge
    if ratio > 1:  # round() goes to the even number; a very long picture keeps one pixel
        width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
    return (height - 1) // PIXELS_PER_FEATURE + 1, (width - 1) // PIXELS_PER_FEATURE + 1


def encode_image(source: Source, longest_edge: int = LONGEST_EDGE) -> Tensor:
    """Turn a picture into pixel values [3, H, W] in fp32, H and W multiples of 28.

    Rules as mistral_common.tokens.tokenizers.image. Raises: ValueError, as load_image.
    """
    image = load_image(source)
    height, width = fit_grid(*image.size, longest_edge)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None]
    size = (height * PIXELS_PER_FEATURE, width * PIXELS_PER_FEATURE)
    if pixels.shape[2:] != size:
        pixels = interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=False)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels[0] / 255 - mean) / std


def stack_images(images: Iterable[Tensor]) -> dict[str, Tensor]:
    """Put pixel values [3, H, W] of several pictures together: pixel_values [M, 3, H, W] and image_sizes [M, 2]."""
    images = list(images)
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    padded = [pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    return {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(sizes)}


class NemotronLabsDiffusionVLMImageProcessor(BaseImageProcessor):
    """Turns pictures into `pixel_values` and `image_sizes`."""

    model_input_names = ["pixel_values", "image_sizes"]  # noqa: RUF012 (declared so by the base class)

    def __init__(self, longest_edge: int = LONGEST_EDGE, rules: str = MISTRAL, **kwargs: Any):
        """Choose the rules.

        Args:
            longest_edge: in pixels; a larger picture is shrunk to it. 1400 makes 50 x 50 features at most.
            rules: "mistral" (training's), or "transformers" for its Pixtral processor (its PIL backend): sides rounded
                down, antialiased bicubic interpolation with other weights on bytes.
            kwargs: for the base class.

        Raises:
            ValueError: no such rules, or an edge shorter than one feature.
        """
        super().__init__(**kwargs)
        if rules not in RULES:
            raise ValueError(f"there are no rules {rules!r} for images: choose {' or '.join(RULES)}")
        if longest_edge < PIXELS_PER_FEATURE:
            raise ValueError(f"longest_edge is {longest_edge}; it must be at least {PIXELS_PER_FEATURE} pixels")
        self.longest_edge = longest_edge
        self.rules = rules

    def preprocess(self, images: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """Return pixel_values [M, 3, H, W] in fp32, each picture in the top left corner, and image_sizes [M, 2].

        images: one picture (see load_image) or a list of them.

        Raises:
            ValueError: no picture, or one that cannot be read.
        """
        sources = list_images(images)
        if not sources:
            raise ValueError("no image was given")
        if self.rules == TRANSFORMERS:
            return BatchFeature(stack_images(self._encode_as_transformers(sources)), tensor_type=return_tensors)
        encoded = stack_images(encode_image(source, self.longest_edge) for source in sources)
        return BatchFeature(encoded, tensor_type=return_tensors)

    def list_grids(self, image_sizes: Tensor) -> list[Grid]:
        """Return the features (height, width) of images of these sizes [M, 2] in pixels."""
        return [(height // PIXELS_PER_FEATURE, width // PIXELS_PER_FEATURE) for height, width in image_sizes.tolist()]

    def _encode_as_transformers(self, sources: list[Source]) -> list[Tensor]:
        from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

        side = {"height": PIXELS_PER_FEATURE, "width": PIXELS_PER_FEATURE}
        processor = PixtralImageProcessorPil(patch_size=side, size={"longest_edge": self.longest_edge})
        encoded = (processor(load_image(source), return_tensors="pt") for source in sources)
        return [image["pixel_values"][0] for image in encoded]


def list_images(images: Any) -> list[Source]:
    """Return the pictures of nested lists in their order, or of a single one."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in list_images(part)]
    return [images]


def _open(source: Source) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes):
        return Image.open(BytesIO(source))
    if isinstance(source, np.ndarray) and source.dtype == np.uint8:
        return Image.fromarray(source)
    if isinstance(source, Path):
        return Image.open(source)
    if not isinstance(source, str):
        raise ValueError(f"an image is a PIL image, an array of bytes, a path, or text, not {type(source).__name__}")
    if source.startswith(("http://", "https://")):
        return load_from_address(source)
    if source.startswith("data:"):
        return Image.open(BytesIO(base64.b64decode(source.partition(",")[2], validate=True)))
    try:
        if Path(source.removeprefix("file://")).is_file():
            return Image.open(source.removeprefix("file://"))
    except OSError:  # a name too long to be a path
        pass
    try:
        return Image.open(BytesIO(base64.b64decode(source, validate=True)))
    except (binascii.Error, UnidentifiedImageError):
        raise FileNotFoundError("it is no file, no address and no base64 of a picture") from None


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB with white where a picture is transparent, as mistral-common does."""
    if image.mode == "RGB":
        image.load()
        return image
    image = image.convert("RGBA")
    background = Image.new("RGBA", image.size, "WHITE")
    background.paste(image, (0, 0), image)
    return background.convert("RGB")


NemotronLabsDiffusionVLMImageProcessor.register_for_auto_class("AutoImageProcessor")
