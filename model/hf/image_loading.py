"""Opens pictures and counts their features by the rules that the released models were trained with; without torch.

The rules are mistral-common's: the longest edge is at most 1400 pixels, both sides then go up to multiples of 28.
Preparation of training data opens pictures by the same functions as a model does.
"""

import base64
import binascii
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .image_tokens import Grid

LONGEST_EDGE = 1400  # pixels
PIXELS_PER_FEATURE = 28  # a patch is 14 pixels wide, a feature 2 patches
# What Pillow raises for files that are no pictures, or were cut off.
UNREADABLE = (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError, binascii.Error)

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
    except UNREADABLE as error:
        name = f"{source!r}"
        name = name if len(name) <= 80 else f"{name[:77]}..."
        raise ValueError(f"the image {name} cannot be read: {error}") from None


def fit_grid(width: int, height: int, longest_edge: int = LONGEST_EDGE) -> Grid:
    """Return the features (height, width) of a picture of `width` x `height` pixels, as mistral-common counts them."""
    ratio = max(width, height) / longest_edge
    if ratio > 1:  # round() goes to the even number; a very long picture keeps one pixel
        width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
    return (height - 1) // PIXELS_PER_FEATURE + 1, (width - 1) // PIXELS_PER_FEATURE + 1


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
        from transformers.image_utils import load_image as load_from_address

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
    """Convert to RGB with white where a picture is transparent, as mistral-common does; 16 bits become the upper 8."""
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I;16"):  # Pillow would make everything above 255 white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGBA")
    background = Image.new("RGBA", image.size, "WHITE")
    background.paste(image, (0, 0), image)
    return background.convert("RGB")
