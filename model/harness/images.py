"""Requests of lm-evaluation-harness with images: tasks that have `doc_to_image` and write `<image>` for each."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from conf.system.errors import UserError
from model.commands.prompt_images import IMAGE_START_TEXT, ReadImage, expand_images
from model.export.images import PromptImage
from model.hf.image_loading import list_images

PLACEHOLDER = "<image>"  # in the texts of the harness's tasks
WHAT = "a prompt of the task"


class ImageContext(str):
    """The text of a prompt, with `<|image_start|>` for each of its images: the harness passes it on as any text."""

    images: tuple[PromptImage, ...]

    @classmethod
    def read(cls, text: str, visuals: Any, read_image: ReadImage | None) -> Self:
        """Open the images of a prompt.

        Args:
            text: as the task writes it.
            visuals: its images, in nested lists (see load_image).
            read_image: opens one; None for a checkpoint of text alone.

        Raises:
            UserError: images that cannot be read, or do not match the places in number.
        """
        sources, places = list_images(visuals), text.count(PLACEHOLDER)
        if read_image is None:
            raise UserError("the task shows images, but the checkpoint reads text alone: take one that reads images")
        if len(sources) != places:
            raise UserError(
                f"{WHAT} has {places} times {PLACEHOLDER} and {len(sources)} images: write it once for each"
            )
        context = cls(text.replace(PLACEHOLDER, IMAGE_START_TEXT))
        try:
            context.images = tuple(read_image(source) for source in sources)
        except ValueError as error:
            raise UserError(f"{WHAT}: {error}") from None
        return context

    def expand(self, token_ids: list[int]) -> list[int]:
        """Return the tokens of the text with all tokens of its images. Raises: UserError."""
        return expand_images(token_ids, self.images, WHAT)


def pad_contexts(prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask [B, P] of prompts, padded on the left to the longest."""
    width = max(map(len, prompts))
    missing = [width - len(prompt) for prompt in prompts]
    ids = [[0] * count + prompt for count, prompt in zip(missing, prompts, strict=True)]
    mask = [[0] * count + [1] * len(prompt) for count, prompt in zip(missing, prompts, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def score_continuation(logits: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Return the log-probability of tokens, and whether greedy decoding would write them.

    logits: [N, vocab], which predict the N tokens of `continuation`.
    """
    chosen = torch.tensor(continuation, device=logits.device)
    table = logits.float().log_softmax(-1)
    return float(table.gather(1, chosen[:, None]).sum()), bool((logits.argmax(-1) == chosen).all())
