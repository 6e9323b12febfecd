"""Turn images into features of the decoder's width: transformers' Pixtral tower and Mistral 3 projector, as they train.

Both are whole on every tensor-parallel rank of the first pipeline stage; image_features.py spreads the images over the
ranks. Small images of one size go through together, others one after another, and every layer is recomputed in the
backward: an image of 1400 x 1400 pixels is 10000 patches.

The tower's activations reach thousands, where bf16 is too coarse (pretrain/README.md has the errors). So weights may be
stored in one format and computed with in another, layer by layer.
Shapes: W width of the tower, I images, P patches and F features of each, H hidden size of the decoder.
"""

from collections.abc import Callable, Sequence
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

PATCHES_TOGETHER = 4096  # of small images: enough to keep a GPU busy
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

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Map images [3, height, width], multiples of a feature's pixels, to features [F, H] of each, row by row."""
        features: dict[int, Tensor] = {}
        for numbers in self.group_images([(image.shape[1], image.shape[2]) for image in images]):
            together = self._compute_features([images[number] for number in numbers])
            features |= dict(zip(numbers, together.chunk(len(numbers)), strict=True))
        return [features[number] for number in range(len(images))]

    def group_images(self, sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Return the numbers of images that go through the tower together: of one size, given in pixels, and small."""
        open_groups: dict[tuple[int, int], list[int]] = {}
        groups: list[list[int]] = []
        for number, size in enumerate(sizes):
            room = max(1, PATCHES_TOGETHER // (size[0] * size[1] // self.vision.patch_size**2))
            group = open_groups.get(size)
            if group is None or len(group) >= room:
                group = open_groups[size] = []
                groups.append(group)
            group.append(number)
        return groups

    def _compute_features(self, images: Sequence[Tensor]) -> Tensor:
        """Map images of one size to the features of all [I * F, H]."""
        height, width = images[0].shape[1:]
        patches = self._recompute(self._embed, *images)
        rotation = self._rotate(height // self.vision.patch_size, width // self.vision.patch_size, patches)
        for layer in self.tower.transformer.layers:
            patches = self._recompute(self._compute, layer, patches, None, rotation)
        sizes = [(height, width)] * len(images)
        return self._recompute(self._compute, self.projector, patches.flatten(0, 1), sizes)

    def _embed(self, *images: Tensor) -> Tensor:
        """Map images of one size to their patches [I, P, W]."""
        patches = self._compute(self.tower.patch_conv, torch.stack(images).to(self.compute_dtype))
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
