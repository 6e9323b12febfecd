"""Turns pictures into what the vision tower reads, by the rules that the released models were trained with.

They are mistral-common's: image_loading.py says which size a picture gets; it is resized to that by bicubic
interpolation without antialiasing. transformers' Pixtral rules are there to compare with.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .image_loading import LONGEST_EDGE, PIXELS_PER_FEATURE, Source, fit_grid, list_images, load_image
from .image_tokens import Grid

RULES = MISTRAL, TRANSFORMERS = "mistral", "transformers"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # red, green, blue
STD = (0.26862954, 0.26130258, 0.27577711)


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


NemotronLabsDiffusionVLMImageProcessor.register_for_auto_class("AutoImageProcessor")
