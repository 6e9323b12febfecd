"""Turn images into features of the decoder's width: transformers' Pixtral tower and Mistral 3 projector, as they train.

Both are whole on every tensor-parallel rank of the first pipeline stage; image_features.py spreads the images over the
ranks. Images go through one after another, so that a feature does not depend on what else a batch holds, and every
layer is recomputed in the backward: an image of 1400 x 1400 pixels is 10000 patches.

The tower's activations reach thousands, where bf16 is too coarse (pretrain/README.md has the errors). So weights may be
stored in one format and computed with in another, layer by layer.
Shapes: W width of the tower, P patches and F features of an image, H hidden size of the decoder.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PixtralVisionConfig, PixtralVisionModel
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

from conf.schema import ModelConfig, VisionConfig, VisionPrecision

VISION_DTYPES = {
    VisionPrecision.fp32: torch.float32,
    VisionPrecision.tf32: torch.float32,
    VisionPrecision.bf16: torch.bfloat16,
}


class VisionEncoder(MegatronModule):
    """Tower and projector. compute_dtype: what they compute in, whatever their weights are stored in."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, compute_dtype: torch.dtype) -> None:
        super().__init__(config=config)
        assert model.vision is not None
        self.vision = model.vision
        tower_config = build_tower_config(model.vision)
        self.tower = PixtralVisionModel(tower_config)
        self.projector = Mistral3MultiModalProjector(build_projector_config(model, tower_config))
        self.compute_dtype = compute_dtype
        # Out of reach of what casts the model to bf16: rounded frequencies would be other positions.
        self._rotary = [type(self.tower.patch_positional_embedding)(tower_config)]

    def forward(self, pixels: Tensor) -> Tensor:
        """Map an image [3, height, width] (multiples of a feature's pixels) to its features [F, H], row by row."""
        pixels = pixels.to(self.compute_dtype)
        height, width = pixels.shape[1:]
        rotation = self._rotate(height // self.vision.patch_size, width // self.vision.patch_size, pixels)
        patches = self._recompute(self._embed, pixels)
        for layer in self.tower.transformer.layers:
            patches = self._recompute(self._compute, layer, patches, None, rotation)
        return self._recompute(self._compute, self.projector, patches[0], [(height, width)])

    def _embed(self, pixels: Tensor) -> Tensor:
        """Map an image to its patches [1, P, W]."""
        patches = self._compute(self.tower.patch_conv, pixels[None])
        return self._compute(self.tower.ln_pre, patches.flatten(2).transpose(1, 2))

    def _rotate(self, height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the places of height x width patches, [P, head_dim] each, in like's format."""
        numbers = (torch.arange(size, device=like.device) for size in (height, width))
        places = torch.stack(torch.meshgrid(*numbers, indexing="ij"), dim=-1).flatten(0, 1)
        self._rotary[0].to(like.device)
        return self._rotary[0](like, places)

    def _recompute(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Apply a function whose activations the backward computes anew."""
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

    def _compute(self, module: nn.Module, *inputs: Any) -> Tensor:
        """Apply a module with its weights in compute_dtype."""
        weights = {name: weight.to(self.compute_dtype) for name, weight in module.named_parameters()}
        return functional_call(module, weights, inputs)


def allow_rounded_matmuls(allowed: bool) -> None:
    """Let CUDA round the inputs of fp32 matmuls and convolutions to 10 bits, or not; it holds for the process."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def build_tower_config(vision: VisionConfig) -> PixtralVisionConfig:
    """Return the tower's configuration in transformers' terms."""
    values: dict[str, Any] = {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "head_dim": vision.head_dim,
        "patch_size": vision.patch_size,
        "image_size": vision.image_size,
        "hidden_act": "silu",
        "attn_implementation": "sdpa",
        "rope_parameters": {"rope_type": "default", "rope_theta": vision.rope_theta},
    }
    return PixtralVisionConfig(**values)


def build_projector_config(model: ModelConfig, tower_config: PixtralVisionConfig) -> Any:
    """Return what transformers' projector reads of a whole Mistral 3 configuration."""
    assert model.vision is not None
    return SimpleNamespace(
        vision_config=tower_config,
        text_config=SimpleNamespace(hidden_size=model.hidden_size, rms_norm_eps=model.rms_norm_eps),
        spatial_merge_size=model.vision.merge_size,
        projector_hidden_act="gelu",
        multimodal_projector_bias=False,
        vision_feature_layer=-1,
    )
