"""YaRN rotary embedding and the query scale that grows with the position. Needs torch alone.

Shapes: B sequences, N tokens, D head_dim. YaRN: arXiv 2309.00071; the order of fp32 operations follows transformers'
`_compute_yarn_parameters`, so that frequencies are equal to the bit: a difference in the last bit would grow with the
position it is multiplied by.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding


def compute_inverse_frequencies(
    head_dim: int,
    *,
    theta: float,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """Compute the rotation per token, in radians, of each pair of dimensions: [head_dim / 2] in fp32 on the CPU.

    Fast pairs keep the base frequency, slow ones are interpolated by `factor`, those in between are blended.

    Args:
        head_dim: even.
        theta: base of the frequencies.
        factor: context extension, taken literally, also below 1.
        original_max_position_embeddings: context before the extension.
        beta_fast: turns within that context above which a pair keeps its frequency.
        beta_slow: turns below which a pair is fully interpolated.
        truncate: round the limits of the blended range to whole pairs.
    """

    def find_dimension(turns: float) -> float:
        return head_dim * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = find_dimension(beta_fast), find_dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    wavelengths = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)
    base_share = 1 - ramp.clamp(0, 1)
    return (1.0 / (factor * wavelengths)) * (1 - base_share) + (1.0 / wavelengths) * base_share


def compute_attention_factor(
    factor: float, *, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """Compute YaRN's factor on cos and sin; it is 1 when mscale equals mscale_all_dim."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def compute_query_scale(position_ids: Tensor, *, beta: float, original_max_position_embeddings: int) -> Tensor:
    """Compute 1 + beta * log(1 + floor(position / original context)) in fp32, in the shape of position_ids.

    beta: `llama_4_scaling_beta` of config.json.
    """
    periods = torch.floor(position_ids / original_max_position_embeddings)
    return 1 + beta * torch.log(1 + periods)


@dataclass(frozen=True)
class PositionEncoding:
    """Rotation and query scale of the tokens of one forward.

    Attributes:
        cos: [B or 1, 1, N, D] in the dtype of the hidden states.
        sin: as cos, its first half negated (see rotate).
        query_scale: [B or 1, 1, N, 1], multiplies queries after rotation; None: all are 1.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None


class RotaryEmbedding:
    """Encodes position_ids for attention.

    It is no module: frequencies must stay fp32 whatever the model is cast to, and must exist when the model was built
    on the meta device.
    """

    def __init__(self, rope: dict[str, Any], head_dim: int):
        """Read `rope`, the config's rope_parameters."""
        self._original_context: int = rope["original_max_position_embeddings"]
        self._beta: float = rope["llama_4_scaling_beta"]
        given = rope.get("attention_factor")
        self.attention_factor = (
            compute_attention_factor(
                rope["factor"], mscale=rope.get("mscale"), mscale_all_dim=rope.get("mscale_all_dim")
            )
            if given is None
            else float(given)
        )
        self.inverse_frequencies = compute_inverse_frequencies(
            head_dim,
            theta=rope["rope_theta"],
            factor=rope["factor"],
            original_max_position_embeddings=self._original_context,
            beta_fast=rope.get("beta_fast") or 32,
            beta_slow=rope.get("beta_slow") or 1,
            truncate=rope.get("truncate", True),
        )
        self._on_device: dict[torch.device, Tensor] = {}

    def __call__(self, position_ids: Tensor, dtype: torch.dtype) -> PositionEncoding:
        """Encode position_ids [B or 1, N], counted from the start of the sequence."""
        device = position_ids.device
        if device not in self._on_device:
            self._on_device[device] = self.inverse_frequencies.to(device)
        angles = position_ids[:, None, :, None].float() * self._on_device[device]
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        scale = compute_query_scale(
            position_ids, beta=self._beta, original_max_position_embeddings=self._original_context
        )
        return PositionEncoding(
            cos=torch.cat((cos, cos), dim=-1).to(dtype),
            sin=torch.cat((-sin, sin), dim=-1).to(dtype),
            query_scale=scale[:, None, :, None].to(dtype),
        )

    def build_table(self, num_positions: int, dtype: torch.dtype, device: torch.device) -> "PositionTable":
        """Encode all of 0..num_positions - 1 once, for many forwards to read."""
        encoding = self(torch.arange(num_positions, device=device)[None], dtype)
        if num_positions <= self._original_context:
            encoding = PositionEncoding(encoding.cos, encoding.sin, None)
        return PositionTable(encoding, num_positions)


@dataclass(frozen=True)
class PositionTable:
    """The encodings of the first `num_positions` positions, read instead of computed in each forward."""

    encoding: PositionEncoding
    num_positions: int

    def take_range(self, start: int, stop: int) -> PositionEncoding:
        """Return the encodings of positions start..stop - 1, the same for all sequences."""
        return self._map(lambda values: values.narrow(2, start, stop - start))

    def take(self, position_ids: Tensor) -> PositionEncoding:
        """Return the encodings of position_ids [B or 1, N]."""
        return self._map(lambda values: embedding(position_ids, values[0, 0])[:, None])

    def _map(self, select: Callable[[Tensor], Tensor]) -> PositionEncoding:
        scale = self.encoding.query_scale
        cos, sin = select(self.encoding.cos), select(self.encoding.sin)
        return PositionEncoding(cos, sin, None if scale is None else select(scale))


def rotate(states: Tensor, encoding: PositionEncoding) -> Tensor:
    """Rotate pairs (i, i + D/2) of states [B, heads, N, D]: (x, y) -> (x cos - y sin, y cos + x sin)."""
    swapped = states.roll(states.shape[-1] // 2, dims=-1)
    return torch.addcmul(states * encoding.cos, swapped, encoding.sin)
