"""Find the images of a batch among its tokens."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from conf.system.errors import UserError
from data_pipeline.batch import Batch, ImageFile, PlacedImage
from data_pipeline.storage.references import count_tokens_of_images, grid_of
from model.hf.image_tokens import IMAGE_END, IMAGE_START


def place_images(batch: Batch, pictures: Sequence[ImageFile], references: np.ndarray) -> Batch:
    """Return the one sequence [1, S] of a batch with its images, in the order of their tokens.

    pictures, references: of the images of its prompts; see storage.references.REFERENCE.
    Raises UserError if the tokens are not those of these images.
    """
    is_prompt = ~(batch.loss_mask | batch.block_padding)[0].numpy() & (batch.document_ids[0].numpy() >= 0)
    tokens = np.where(is_prompt, batch.tokens[0].numpy(), -1)
    first = np.flatnonzero(tokens == IMAGE_START)
    last = first + count_tokens_of_images(references) - 1 if len(first) == len(references) else first
    if len(first) != len(references) or (last >= len(tokens)).any() or (tokens[last] != IMAGE_END).any():
        raise UserError(
            f"a sequence has the tokens of {len(first)} images, and its documents hold {len(references)} of sizes that "
            "do not fit them: the data were changed; prepare them again"
        )
    placed = (
        PlacedImage(0, int(position), grid_of(reference), picture)
        for position, reference, picture in zip(first, references, pictures, strict=True)
    )
    return replace(batch, images=tuple(placed))
