"""YaRN rotary embedding and position-dependent query scaling.

Shapes: B batch, N tokens, D head_dim. YaRN: arXiv 2309.00071; the order of fp32 operations follows transformers'
`_compute_yarn_parameters`, so that frequencies are equal to the bit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding


@dataclass(frozen=True)
class PositionEncoding:
    """What attention needs to know about positions, computed once per forward.

    cos, sin: [B or 1, 1, N, D] in the dtype of the hidden states; the first half of sin negated (see rotate).
    query_scale: [B or 1, 1, N, 1], multiplies queries after rotation; None: all are 1.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None


def _correction_range(rope: dict[str, Any], head_dim: int) -> tuple[float, float]:
    """Dimensions between which YaRN blends from extrapolation to interpolation."""

    def dimension_with(rotations: float) -> float:
        context = rope["original_max_position_embeddings"]
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = dimension_with(rope.get("beta_fast") or 32), dimension_with(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)


def compute_inverse_frequencies(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Inverse frequencies [head_dim / 2] in fp32 on the CPU; `factor` is taken literally, also below 1."""
    wavelengths = rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    low, high = _correction_range(rope, head_dim)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)
    keep = 1 - ramp.clamp(0, 1)
    return (1.0 / (rope["factor"] * wavelengths)) * (1 - keep) + (1.0 / wavelengths) * keep


def compute_attention_factor(rope: dict[str, Any]) -> float:
    """Factor on cos and sin; 1 when mscale equals mscale_all_dim."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return temperature(1.0)


class RotaryEmbedding:
    """Turns positions into a PositionEncoding.

    Not a module: frequencies must stay fp32 whatever the model is cast to, and must exist when the model was built
    on the meta device; they are made at first use, once per device.
    """

    def __init__(self, rope: dict[str, Any], head_dim: int):
        self._rope = rope
        self._head_dim = head_dim
        self._attention_factor = compute_attention_factor(rope)
        self._frequencies: dict[torch.device, Tensor] = {}

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> PositionEncoding:
        """Encode positions [B or 1, N] (tokens from the start of the sequence)."""
        if positions.device not in self._frequencies:
            frequencies = compute_inverse_frequencies(self._rope, self._head_dim)
            self._frequencies[positions.device] = frequencies.to(positions.device)
        angles = positions[:, None, :, None].float() * self._frequencies[positions.device]
        cos, sin = angles.cos() * self._attention_factor, angles.sin() * self._attention_factor
        periods = torch.floor(positions / self._rope["original_max_position_embeddings"])
        scale = 1 + self._rope["llama_4_scaling_beta"] * torch.log(1 + periods)
        return PositionEncoding(
            cos=torch.cat((cos, cos), dim=-1).to(dtype),
            sin=torch.cat((-sin, sin), dim=-1).to(dtype),
            query_scale=scale[:, None, :, None].to(dtype),
        )

    def make_table(self, num_positions: int, dtype: torch.dtype, device: torch.device) -> "PositionTable":
        """All of 0..num_positions - 1 encoded, for forwards that follow each other."""
        encoding = self(torch.arange(num_positions, device=device)[None], dtype)
        if num_positions <= self._rope["original_max_position_embeddings"]:
            encoding = PositionEncoding(encoding.cos, encoding.sin, None)
        return PositionTable(encoding, num_positions)


@dataclass(frozen=True)
class PositionTable:
    """Encodings of the first `num_positions` positions, to take from instead of computing them in each forward."""

    encoding: PositionEncoding
    num_positions: int

    def take_range(self, start: int, stop: int) -> PositionEncoding:
        """Of positions start..stop - 1, the same in all rows."""
        return self._map(lambda values: values.narrow(2, start, stop - start))

    def take(self, positions: Tensor) -> PositionEncoding:
        """Of positions [B or 1, N]."""
        return self._map(lambda values: embedding(positions, values[0, 0])[:, None])

    def _map(self, select: Callable[[Tensor], Tensor]) -> PositionEncoding:
        scale = self.encoding.query_scale
        cos, sin = select(self.encoding.cos), select(self.encoding.sin)
        return PositionEncoding(cos, sin, None if scale is None else select(scale))


def rotate(states: Tensor, encoding: PositionEncoding) -> Tensor:
    """Rotate pairs (i, i + D/2) of states [B, heads, N, D]: (x, y) -> (x cos - y sin, y cos + x sin)."""
    swapped = states.roll(states.shape[-1] // 2, dims=-1)
    return torch.addcmul(states * encoding.cos, swapped, encoding.sin)
