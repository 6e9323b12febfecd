"""Turns texts with images into what the model's entry points take: tokens, padded on the left, and pixel values."""

from typing import Any

import torch
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .image_loading import list_images
from .image_tokens import IMAGE_START, IMAGE_TOKENS, expand_image_tokens


class NemotronLabsDiffusionVLMProcessor(ProcessorMixin):
    """A tokenizer and an image processor: `model.generate(**processor(text=..., images=...), mode="linear")`.

    `apply_chat_template(messages, tokenize=True, return_dict=True)` reads images from the messages' content.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        """Put the two together; raise ValueError for a tokenizer without the tokens of images."""
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        for token, token_id in IMAGE_TOKENS.items():
            if (found := tokenizer.convert_tokens_to_ids(token)) != token_id:
                raise ValueError(
                    f"the tokenizer has id {found} for {token}, not {token_id}: it belongs to a model without images"
                )

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        *,
        return_tensors: str | None = "pt",
        add_special_tokens: bool = True,
        videos: None = None,
        audio: None = None,
    ) -> BatchFeature:
        """Return input_ids and attention_mask [B, P] (zero on left padding), with images pixel_values and image_sizes.

        Args:
            images: of all texts, in their order; one, a list, or a list for each text (see load_image). None: no image.
            text: one or several; `<|image_start|>` stands where an image does.
            return_tensors: "pt", or None for lists of token ids.
            add_special_tokens: what the tokenizer adds by itself (a bos token).
            videos: not available.
            audio: not available.

        Raises:
            ValueError: no text, images that do not match the texts in number or cannot be read, videos, audio.
        """
        if videos is not None or audio is not None:
            raise ValueError("this model reads text and images: leave videos and audio out")
        if text is None or text == []:
            raise ValueError("give text; an image alone is <|image_start|>")
        texts = [text] if isinstance(text, str) else list(text)
        prompts: list[list[int]] = self.tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
        sources = list_images(images)
        pictures = self.image_processor(sources) if sources else {}
        grids = self.image_processor.list_grids(pictures["image_sizes"]) if sources else []
        padded = self._pad(_expand(prompts, images, grids))
        if return_tensors is not None:
            padded = {name: torch.tensor(values) for name, values in padded.items()}
        return BatchFeature({**padded, **pictures}, tensor_type=return_tensors)

    @property
    def model_input_names(self) -> list[str]:
        """Name what the model's forward takes."""
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]

    def _pad(self, prompts: list[list[int]]) -> dict[str, list[list[int]]]:
        # The format has no pad token; what stands under a zero of the mask is read by nobody.
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        missing = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
        return {
            "input_ids": [[padding] * count + prompt for count, prompt in zip(missing, prompts, strict=True)],
            "attention_mask": [[0] * count + [1] * len(prompt) for count, prompt in zip(missing, prompts, strict=True)],
        }


def _expand(prompts: list[list[int]], images: Any, grids: list[tuple[int, int]]) -> list[list[int]]:
    """Replace each `<|image_start|>` of the prompts by the tokens of its image.

    images: as given; with a list for each text the numbers must match in each of them, else in all of them together.
    """
    places = [prompt.count(IMAGE_START) for prompt in prompts]
    by_text = isinstance(images, (list, tuple)) and bool(images) and all(isinstance(i, (list, tuple)) for i in images)
    counts = [len(list_images(part)) for part in images] if by_text else places
    if len(counts) != len(prompts) or counts != places or sum(counts) != len(grids):
        raise ValueError(
            f"the texts have {places} times <|image_start|>, the images given are {counts if by_text else len(grids)}: "
            "write it once for each image"
        )
    expanded, start = [], 0
    for prompt, count in zip(prompts, counts, strict=True):
        expanded.append(expand_image_tokens(prompt, grids[start : start + count]))
        start += count
    return expanded


NemotronLabsDiffusionVLMProcessor.register_for_auto_class("AutoProcessor")
