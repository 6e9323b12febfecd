"""Tiny vision-language models, transformers' Mistral 3 with their weights, and prompts with images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Ministral3Config, Mistral3Config, Mistral3ForConditionalGeneration

from model.convert.hf_target import copy_code
from model.convert.image_vocabulary import name_image_tokens
from model.convert.processor_config import build_processor_config
from model.convert.vision_config import read_vision_config
from model.export.shipped_code import VLM_TYPE
from model.hf.configuration_nemotron_labs_diffusion_vlm import NemotronLabsDiffusionVLMConfig
from model.hf.image_tokens import Grid, list_image_tokens
from model.hf.modeling_nemotron_labs_diffusion_vlm import NemotronLabsDiffusionVLMModel
from tests.helpers.tiny_checkpoints import MASK_TOKEN_ID
from tests.helpers.tiny_exports import TINY, TINY_ROPE, VOCAB_SIZE, save_tiny_export, spread_norms

PIXELS = 28  # along each side of a feature
LONGEST_EDGE = 168  # of the tiny tower: 6 features
ROPE = {**TINY_ROPE, "type": "yarn"}
VISION = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "patch_size": 14,
    "image_size": LONGEST_EDGE,
    "num_channels": 3,
    "hidden_act": "silu",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "initializer_range": 0.2,
}


def make_vlm_config(vision: dict[str, Any] | None = None, **changes: Any) -> NemotronLabsDiffusionVLMConfig:
    """Make a config of two text and two vision layers; changes of the text model's keys, `vision` of the tower's."""
    values: dict[str, Any] = {
        **TINY,
        "vocab_size": 64,
        "max_position_embeddings": 384,
        "mask_token_id": 60,
        "eos_token_id": 2,
        "rope_parameters": ROPE,
    }
    return NemotronLabsDiffusionVLMConfig(vision_config={**VISION, **(vision or {})}, **{**values, **changes})


def make_vlm(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """Make a random model in eval mode; changes as in make_vlm_config."""
    torch.manual_seed(seed)
    model: Any = NemotronLabsDiffusionVLMModel(make_vlm_config(**changes))
    model = model.to(dtype).eval()
    spread_norms(model)
    return model


def make_mistral3(model: Any) -> Any:
    """Build transformers' Mistral3ForConditionalGeneration with the weights of `model`, whose image token is 19."""
    left_out = {"architectures", "dtype", "pad_token_id"}
    names = vars(make_vlm_config()).keys() & vars(Ministral3Config()).keys() - left_out
    text_config = {name: getattr(model.config, name) for name in names if not name.startswith("_")}
    reference: Any = Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={**text_config, "model_type": "ministral3", "pad_token_id": None},
            vision_config=model.config.vision_config.to_dict(),
            image_token_index=19,
            tie_word_embeddings=False,
        )
    )
    reference.load_state_dict({_rename(name): weight for name, weight in model.state_dict().items()})
    return reference.to(model.dtype).eval()


def _rename(name: str) -> str:
    part, _, rest = name.partition(".")
    if part == "diffusion_head":
        return f"lm_head.{rest}"
    is_vision = rest.startswith(("vision_tower.", "multi_modal_projector."))
    return f"model.{rest}" if is_vision else f"model.language_model.{rest}"


@dataclass(frozen=True)
class ImagePrompts:
    """Prompts with images, as the entry points take them.

    Attributes:
        ids: [B, P], padded on the left.
        mask: [B, P].
        images: pixel_values [M, 3, H, W] and image_sizes [M, 2] of all prompts.
        singles: each prompt by itself: its ids [1, length] and its images, {} for none.
    """

    ids: Tensor
    mask: Tensor
    images: dict[str, Tensor]
    singles: list[tuple[Tensor, dict[str, Tensor]]]


def make_prompts(prompts: Sequence[Sequence[int | Grid]], seed: int = 0) -> ImagePrompts:
    """Make prompts of token ids and images: a grid (height, width) in features stands for a random image."""
    generator = torch.Generator().manual_seed(seed)
    singles, everything = [], []
    for prompt in prompts:
        grids = [part for part in prompt if isinstance(part, tuple)]
        pixels = [torch.randn(3, h * PIXELS, w * PIXELS, generator=generator) for h, w in grids]
        ids = [t for part in prompt for t in (list_image_tokens(part) if isinstance(part, tuple) else [part])]
        singles.append((torch.tensor([ids]), _stack(pixels)))
        everything += pixels
    width = max(ids.shape[1] for ids, _ in singles)
    padded = torch.zeros(len(singles), width, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for index, (ids, _) in enumerate(singles):
        padded[index, width - ids.shape[1] :] = ids[0]
        mask[index, width - ids.shape[1] :] = 1
    return ImagePrompts(padded, mask, _stack(everything), singles)


def _stack(pixels: list[Tensor]) -> dict[str, Tensor]:
    """Put images of any size into one tensor; what lies outside of them is noise that nobody may read."""
    if not pixels:
        return {}
    height, width = (max(image.shape[side] for image in pixels) for side in (1, 2))
    stacked = torch.full((len(pixels), 3, height, width), 1e4)
    for index, image in enumerate(pixels):
        stacked[index, :, : image.shape[1], : image.shape[2]] = image
    return {"pixel_values": stacked, "image_sizes": torch.tensor([image.shape[1:] for image in pixels])}


def save_vlm_export(directory: Path, model: Any = None, *, chat_template: bool = True) -> Path:
    """Save weights, code, tokenizer and processor of a model with images (by default a random one) and a template."""
    if model is None:
        model = make_vlm(torch.float32, vocab_size=VOCAB_SIZE, mask_token_id=MASK_TOKEN_ID, eos_token_id=11)
    save_tiny_export(directory, model=model, chat_template=chat_template)
    copy_code(directory, VLM_TYPE)
    name_image_tokens(directory)
    vision = read_vision_config(json.loads((directory / "config.json").read_text()), directory)
    (directory / "processor_config.json").write_text(json.dumps(build_processor_config(vision, {})))
    return directory


def draw_picture(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """Save a picture of noise, which no two seeds share."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path
