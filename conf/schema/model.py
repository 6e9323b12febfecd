"""Dimensions of the decoder, its rotary embedding and its vision tower; those of the releases: conf/model/*.yaml."""

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING


@dataclass
class RopeConfig:
    """YaRN rotary embedding plus position-dependent query scaling (Ministral 3).

    theta: base of the rotary frequencies (no unit).
    factor: YaRN context extension, taken literally (released checkpoints have 16 and 0.25).
    original_max_position_embeddings: tokens; context the frequencies were first trained for.
    beta_fast, beta_slow: rotations bounding the YaRN correction range.
    mscale, mscale_all_dim: attention temperature of YaRN; equal values give an attention factor of 1.
    truncate: round the correction range to whole dimensions.
    llama_4_scaling_beta: query is multiplied by 1 + beta * log(1 + floor(position / original_max)).
    """

    theta: float = 1e6
    factor: float = 16.0
    original_max_position_embeddings: int = 16384
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    truncate: bool = True
    llama_4_scaling_beta: float = 0.1


@dataclass
class VisionConfig:
    """A Pixtral vision tower, and the projector of its features into the decoder. The defaults are the released tower.

    num_layers, hidden_size, ffn_hidden_size, num_attention_heads: counts and widths of the tower.
    patch_size: pixels along each side of a patch.
    merge_size: patches along each side of a feature.
    image_size: pixels; longest side of an image.
    rope_theta: base of the tower's rotary frequencies (no unit).
    """

    num_layers: int = 24
    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    num_attention_heads: int = 16
    patch_size: int = 14
    merge_size: int = 2
    image_size: int = 1540
    rope_theta: float = 1e4

    @property
    def num_channels(self) -> int:
        """Colours of a pixel: red, green, blue."""
        return 3

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def pixels_per_feature(self) -> int:
        """Pixels along each side of a feature."""
        return self.patch_size * self.merge_size

    @property
    def patch_width(self) -> int:
        """Numbers that a patch consists of, in three colours."""
        return self.num_channels * self.patch_size**2

    @property
    def merged_width(self) -> int:
        """Width of the patches of a feature together."""
        return self.hidden_size * self.merge_size**2

    @property
    def num_tower_parameters(self) -> int:
        """Weights of the tower."""
        layer = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        return self.num_layers * layer + self.hidden_size * (self.patch_width + 1)

    def count_projector_parameters(self, hidden_size: int) -> int:
        """Return the weights of the projector into a decoder of this hidden size."""
        return self.hidden_size * (1 + self.merged_width) + hidden_size * (self.hidden_size + hidden_size)


@dataclass
class ModelConfig:
    """A dense Ministral 3 decoder with an untied head, and perhaps a vision tower.

    name: label written into checkpoints and exports.
    num_layers, hidden_size, ffn_hidden_size: counts and widths of the decoder.
    num_attention_heads, num_key_value_heads: query heads and grouped key/value heads.
    head_dim: width of one head; never hidden_size / num_attention_heads in this family.
    vocab_size: rows of the embedding and of the head.
    rms_norm_eps: added to the mean square before the root.
    max_position_embeddings: tokens; longest position the export claims.
    init_std: standard deviation of fresh weights (runs without `init_from`).
    vision: see VisionConfig; null is a model of text alone.
    """

    name: str = MISSING
    num_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    head_dim: int = MISSING
    vocab_size: int = MISSING
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 262144
    init_std: float = 0.02
    rope: RopeConfig = field(default_factory=RopeConfig)
    vision: Optional[VisionConfig] = None

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Width of all key heads together (values have the same)."""
        return self.num_key_value_heads * self.head_dim

    @property
    def num_layer_parameters(self) -> int:
        """Weights of all layers' matrices, without norms."""
        attention = self.hidden_size * 2 * (self.query_width + self.key_value_width)
        return self.num_layers * (attention + 3 * self.hidden_size * self.ffn_hidden_size)

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model: layers, norms, embedding and head, tower and projector."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        text = self.num_layer_parameters + norms + 2 * self.vocab_size * self.hidden_size
        return text + self.num_vision_parameters

    @property
    def num_vision_parameters(self) -> int:
        """Weights of tower and projector; 0 without them."""
        if self.vision is None:
            return 0
        return self.vision.num_tower_parameters + self.vision.count_projector_parameters(self.hidden_size)
