"""The vision-language model: the text model, and images that take the place of some embeddings of a prompt.

Decoding, cache, options and adapters are the text model's. Files that are not used here are imported all the same:
before 5.11, transformers copies from a local folder only what this file itself imports. Shapes: M images, F features of
all of them.
"""

import importlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PixtralVisionModel
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

from .attention_mask import build_visibility  # noqa: F401
from .cache import PrefixCache  # noqa: F401
from .configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig  # noqa: F401
from .configuration_nemotron_labs_diffusion_vlm import NemotronLabsDiffusionVLMConfig
from .decision import score_masked_tokens  # noqa: F401
from .decoding import decode  # noqa: F401
from .image_tokens import IMAGE_PAD, Grid, check_image_tokens
from .layers import NemotronLabsDiffusionEncoder
from .modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel
from .options import DecodeOptions  # noqa: F401
from .quadratic import decode_quadratic_speculation  # noqa: F401
from .rope import RotaryEmbedding  # noqa: F401
from .sampling import resolve_temperature  # noqa: F401
from .session import read_padding_mask
from .speculation import decode_linear_speculation  # noqa: F401

ADAPTED_BY_DRAFTERS = "o_proj"
TOWER_MODULES = r".*vision_tower\..*"


class NemotronLabsDiffusionVLMEncoder(NemotronLabsDiffusionEncoder):
    """The text model's layers, with transformers' Pixtral tower and Mistral 3 projector beside them."""

    def __init__(self, config: NemotronLabsDiffusionVLMConfig):
        super().__init__(config)
        self.vision_tower = PixtralVisionModel(config.vision_config)
        self.multi_modal_projector = Mistral3MultiModalProjector(_make_projector_config(config))


class NemotronLabsDiffusionVLMModel(NemotronLabsDiffusionModel):
    """The tri-mode model that also reads images.

    All entry points take `pixel_values` [M, 3, H, W] and `image_sizes` [M, 2] as the processor returns them, by
    keyword: the images of all prompts in the order of their tokens, each in the top left corner.
    """

    config_class = NemotronLabsDiffusionVLMConfig
    encoder_class = NemotronLabsDiffusionVLMEncoder
    _no_split_modules = ["NemotronLabsDiffusionLayer", "PixtralAttentionLayer"]  # noqa: RUF012 (as in the base class)

    def __init__(self, config: NemotronLabsDiffusionVLMConfig, tower_dtype: torch.dtype | None = None):
        """Build the model.

        Args:
            config: of tower, projector and text model.
            tower_dtype: what tower and projector compute in, whatever their weights are stored in; None: fp32, or the
                weights' own dtype if that is wider. `from_pretrained(..., tower_dtype=torch.bfloat16)` sets it.
        """
        super().__init__(config)
        self._tower_dtype = tower_dtype

    def load_adapter(
        self, peft_model_id: Any = None, adapter_name: str | None = None, *rest: Any, **kwargs: Any
    ) -> Any:
        """Load an adapter as the text model does; one of `o_proj` alone is kept out of the vision tower."""
        if peft_model_id is not None and kwargs.get("peft_config") is None:
            # Not imported on top: transformers demands every package that a shipped file imports.
            peft = importlib.import_module("peft")
            kwargs["peft_config"] = peft.PeftConfig.from_pretrained(peft_model_id, **kwargs.get("adapter_kwargs") or {})
        config: Any = kwargs.get("peft_config")
        targets = getattr(config, "target_modules", None) or ()
        if set(targets) == {ADAPTED_BY_DRAFTERS} and not config.exclude_modules:
            config.exclude_modules = TOWER_MODULES
        return super().load_adapter(peft_model_id, adapter_name, *rest, **kwargs)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (images come before what is passed on)
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute logits as the text model does, with the images of the new tokens if there are any.

        Args:
            input_ids: [B, N], image tokens expanded.
            attention_mask: as in the text model.
            position_ids: as in the text model.
            past_key_values: as in the text model.
            inputs_embeds: as in the text model; not with images.
            labels: as in the text model.
            pixel_values: [M, 3, H, W].
            image_sizes: [M, 2].
            kwargs: further arguments of the text model's forward.

        Raises:
            ValueError: as the text model, or images that cannot be read or do not match the tokens.
        """
        if pixel_values is not None or image_sizes is not None:
            if input_ids is None or inputs_embeds is not None:
                raise ValueError("images need input_ids, which say where they stand: give no inputs_embeds")
            counted = torch.ones_like(input_ids, dtype=torch.bool)
            if attention_mask is not None and attention_mask.dim() == 2:
                counted = attention_mask[:, -input_ids.shape[1] :] != 0
            inputs_embeds = self._embed(input_ids, counted.to(input_ids.device), pixel_values, image_sizes)
            input_ids = None
        return super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, **kwargs
        )

    @torch.no_grad()
    def embed_prompt(  # pyright: ignore[reportIncompatibleMethodOverride] (names what the base class refuses)
        self,
        prompt_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
    ) -> Tensor | None:
        """Return the embeddings [B, P, hidden] of prompts with images; None without images.

        prompt_ids [B, P]; attention_mask [B, P], zero on left padding.

        Raises:
            ValueError: image tokens and images that do not match, images that cannot be read, padding on the right.
        """
        counted = read_padding_mask(prompt_ids, attention_mask)
        if pixel_values is not None or image_sizes is not None:
            return self._embed(prompt_ids, counted, pixel_values, image_sizes)
        if num_pads := int((prompt_ids[counted] == IMAGE_PAD).sum()):
            raise ValueError(
                f"the prompts hold {num_pads} image tokens (id {IMAGE_PAD}) but no images: give pixel_values and "
                "image_sizes too"
            )
        return None

    def compute_image_features(self, pixel_values: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Compute the features [F, hidden] of images [M, 3, H, W] of these heights and widths in pixels.

        One image after another: a feature does not depend on what else is in the batch, and the tower's attention mask
        is as large as one image asks for.
        """
        weight = self.get_input_embeddings().weight
        dtype = self._tower_dtype or torch.promote_types(weight.dtype, torch.float32)
        encoder: Any = self.encoder
        tower, projector = encoder.vision_tower, encoder.multi_modal_projector
        features = []
        run_tower, run_projector = (_compute_in(dtype, module) for module in (tower, projector))
        for pixels, (height, width) in zip(pixel_values, image_sizes, strict=True):
            image = pixels[None, :, :height, :width].to(weight.device, dtype)
            patches = run_tower(image, image_sizes=[(height, width)]).last_hidden_state
            features.append(run_projector(patches[0], [(height, width)]))
        return torch.cat(features)

    def _embed(
        self, input_ids: Tensor, counted: Tensor, pixel_values: Tensor | None, image_sizes: Tensor | None
    ) -> Tensor:
        """Embed input_ids [B, N], with features at the image tokens that count [B, N]."""
        config: Any = self.config
        sizes = check_images(config, pixel_values, image_sizes)
        assert pixel_values is not None
        side = config.pixels_per_feature
        grids: list[Grid] = [(height // side, width // side) for height, width in sizes]
        check_image_tokens(input_ids[counted].tolist(), grids)
        embedded = self.encoder.embed_tokens(input_ids.to(self.get_input_embeddings().weight.device))
        where = ((input_ids == IMAGE_PAD) & counted)[..., None].to(embedded.device)
        return embedded.masked_scatter(where, self.compute_image_features(pixel_values, sizes).to(embedded))


def check_images(config: NemotronLabsDiffusionVLMConfig, pixel_values: Any, image_sizes: Any) -> list[tuple[int, int]]:
    """Return the height and width of each image in pixels.

    pixel_values: [M, 3, H, W], float. image_sizes: [M, 2], a tensor or nested lists of whole numbers.

    Raises:
        ValueError: one of the two is missing, of another shape, or holds sizes that are no images of the tower's.
    """
    if pixel_values is None or image_sizes is None:
        raise ValueError("give pixel_values and image_sizes together, as the processor returns them")
    tower: Any = config.vision_config
    if not isinstance(pixel_values, Tensor) or pixel_values.dim() != 4 or pixel_values.shape[1] != tower.num_channels:
        got = list(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values)
        raise ValueError(f"pixel_values must be a tensor [images, {tower.num_channels}, height, width], got {got}")
    sizes = torch.as_tensor(image_sizes)
    if sizes.shape != (len(pixel_values), 2) or sizes.is_floating_point():
        raise ValueError(
            f"image_sizes must be the height and width of {len(pixel_values)} images, whole numbers, got "
            f"{sizes.dtype} {list(sizes.shape)}"
        )
    side = config.pixels_per_feature
    heights_and_widths = [(int(height), int(width)) for height, width in sizes.tolist()]
    for index, size in enumerate(heights_and_widths):
        if min(size) < side or size[0] % side or size[1] % side:
            raise ValueError(
                f"image {index} of image_sizes is {size[0]} x {size[1]}: sides must be multiples of {side} pixels. The "
                "processor resizes images so"
            )
        if max(size) > tower.image_size or size[0] > pixel_values.shape[2] or size[1] > pixel_values.shape[3]:
            raise ValueError(
                f"image {index} of image_sizes is {size[0]} x {size[1]}, larger than its pixel_values "
                f"({pixel_values.shape[2]} x {pixel_values.shape[3]}) or than the tower's {tower.image_size} pixels"
            )
    return heights_and_widths


def _compute_in(dtype: torch.dtype, module: nn.Module) -> Callable[..., Any]:
    """Return a module as a function that computes in `dtype`, whatever its weights are stored in."""
    if any(weight.dtype != dtype for weight in module.parameters()) and _recomputes(module):
        raise ValueError(
            f"gradient checkpointing would recompute images in the dtype of their weights, not in {dtype}: load the "
            "model in fp32, or give tower_dtype"
        )
    weights = {name: weight.to(dtype) for name, weight in module.named_parameters()} | _make_frequencies(module)
    return lambda *args, **kwargs: functional_call(module, weights, args, kwargs)


def _recomputes(module: nn.Module) -> bool:
    """Return whether layers of a module run again in the backward pass."""
    return module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules())


def _make_frequencies(module: nn.Module) -> dict[str, Tensor]:
    """Make the buffers of a tower's rotary embedding anew: those of a model cast to bf16 are rounded."""
    rotary = getattr(module, "patch_positional_embedding", None)
    if rotary is None:
        return {}
    device = next(module.parameters()).device
    fresh: nn.Module = type(rotary)(module.config)
    return {f"patch_positional_embedding.{name}": value.to(device) for name, value in fresh.named_buffers()}


def _make_projector_config(config: NemotronLabsDiffusionVLMConfig) -> Any:
    """Return what transformers' projector reads; there the text model's keys stand in a configuration of their own."""
    names = ("spatial_merge_size", "projector_hidden_act", "multimodal_projector_bias", "vision_feature_layer")
    values = {name: getattr(config, name) for name in names}
    text = SimpleNamespace(hidden_size=config.hidden_size, rms_norm_eps=config.rms_norm_eps)
    return SimpleNamespace(vision_config=config.vision_config, text_config=text, **values)


# save_pretrained then writes auto_map and copies this file and those it imports.
NemotronLabsDiffusionVLMModel.register_for_auto_class("AutoModel")
