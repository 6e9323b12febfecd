"""Rotary embedding with YaRN frequencies, and query scaling by position.

Shapes: B batch, R rows (S, or 2S in the joint stage), H heads, D head_dim.
Source: YaRN (arXiv 2309.00071); constants and rounding as in transformers' `_compute_yarn_parameters`;
query scaling as in Ministral 3 (`llama_4_scaling_beta`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from conf.schema import RopeConfig

MOST_FORMS = 32


@dataclass(frozen=True)
class Rotation:
    """cos, sin [R, B or 1, 1, D], the first half of sin negated; query_scale [R, B or 1, 1, 1], None: all are 1.

    Rows first, as megatron-core lays tensors out.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None


def compute_inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Rotations per token of each dimension pair [D/2], fp32: interpolated below, kept above the correction range.

    The order of operations is transformers': a last-bit difference grows with the position it is multiplied by.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    frequencies = rope.theta**exponents
    low, high = _correction_range(rope, head_dim)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return (1.0 / (rope.factor * frequencies)) * (1 - kept) + (1.0 / frequencies) * kept


def _correction_range(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """First and last dimension pair between full interpolation and none."""

    def dimension(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high


def compute_attention_factor(rope: RopeConfig) -> float:
    """Scale of cos and sin; 1 when mscale equals mscale_all_dim."""

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def compute_query_scale(positions: Tensor, rope: RopeConfig) -> Tensor:
    """1 + beta * log(1 + floor(position / original_max)), fp32, shape of `positions`."""
    periods = torch.floor(positions.float() / rope.original_max_position_embeddings)
    return 1 + rope.llama_4_scaling_beta * torch.log1p(periods)


def compute_rotation(
    positions: Tensor, rope: RopeConfig, head_dim: int, dtype: torch.dtype, *, scales_queries: bool = True
) -> Rotation:
    """Everything attention needs from in-half positions [B, R] (computed in fp32, returned in `dtype`).

    scales_queries: whether any position reaches rope.original_max_position_embeddings, below which queries stay as
    they are; the caller knows it without asking the device.
    """
    inverse_frequencies = compute_inverse_frequencies(rope, head_dim).to(positions.device)
    angles = (positions.T.float()[:, :, None] * inverse_frequencies)[:, :, None]
    factor = compute_attention_factor(rope)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    scale = compute_query_scale(positions.T, rope)[:, :, None, None].to(dtype) if scales_queries else None
    return Rotation(torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype), scale)


def apply_rotation(x: Tensor, rotation: Rotation, scale: bool = False) -> Tensor:
    """Rotates x [R, B, H, D] by its positions (dimension d is paired with d + D/2); `scale`: queries are scaled too."""
    return _Rotate.apply(x, rotation, scale)


class _Rotate(torch.autograd.Function):
    """A linear map, so that nothing of x is kept: going back turns by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Rotation, scale: bool) -> Tensor:
        ctx.rotation, ctx.scale = rotation, scale
        return _turn(x, rotation, scale, forward=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grad, ctx.rotation, ctx.scale, forward=False), None, None


def _turn(x: Tensor, rotation: Rotation, scale: bool, forward: bool) -> Tensor:
    query_scale = rotation.query_scale if scale else None
    turn = _compile_turn() if x.is_cuda else turn_heads  # model/megatron/kernel_choice.py says why
    return turn(x.detach(), rotation.cos, rotation.sin, query_scale, forward)


@cache
def _compile_turn() -> Callable[..., Tensor]:
    """One kernel per form, none with sizes unknown: queries or keys, there or back, positions of one sequence or of
    each, scaled or not. That is more than the 8 forms after which torch would compile no more."""
    torch._dynamo.config.recompile_limit = max(MOST_FORMS, torch._dynamo.config.recompile_limit)
    return torch.compile(turn_heads, dynamic=False)


def turn_heads(x: Tensor, cos: Tensor, sin: Tensor, query_scale: Tensor | None, forward: bool) -> Tensor:
    """x [R, B, H, D] turned, or turned back; cos, sin, query_scale as in Rotation."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    turned = torch.mul(x, cos).addcmul_(swapped, sin, value=1 if forward else -1)
    return turned if query_scale is None else turned.mul_(query_scale)
