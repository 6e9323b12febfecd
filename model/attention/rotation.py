"""Rotate queries and keys by their position ids, and scale queries (Ministral 3's `llama_4_scaling_beta`).

Frequencies, YaRN's factor and the query scale are those of exports, computed by model/hf/rope.py.
Shapes: B batch, R positions (S, or 2S in the joint stage), H heads, D head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from conf.schema import RopeConfig
from model.hf.rope import compute_attention_factor, compute_inverse_frequencies, compute_query_scale

MAX_FORMS = 16 * 8


@dataclass(frozen=True)
class Rotation:
    """Holds what rotates and scales the heads of a forward.

    cos, sin: [R, B or 1, 1, D], the first half of sin negated. query_scale: [R, B or 1, 1, 1]; None: all are 1.
    Positions come first, as megatron-core lays tensors out.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None


class RotationBuilder:
    """Turns position ids into rotations; frequencies and YaRN's factor are computed once, by model/hf/rope.py."""

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        """Compute the frequencies [D / 2] of `rope`."""
        self._rope = rope
        self.inverse_frequencies = compute_inverse_frequencies(
            head_dim,
            theta=rope.theta,
            factor=rope.factor,
            original_max_position_embeddings=rope.original_max_position_embeddings,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            truncate=rope.truncate,
        )
        self.attention_factor = compute_attention_factor(
            rope.factor, mscale=rope.mscale, mscale_all_dim=rope.mscale_all_dim
        )

    def build(self, position_ids: Tensor, dtype: torch.dtype, *, scales_queries: bool = True) -> Rotation:
        """Return the rotation by position_ids [B, R], computed in fp32 on their device.

        scales_queries: whether any of them reaches rope.original_max_position_embeddings, below which queries stay as
        they are; the caller knows it without asking the device.
        """
        self.inverse_frequencies = self.inverse_frequencies.to(position_ids.device)
        by_position = position_ids.T
        angles = (by_position.float()[:, :, None] * self.inverse_frequencies)[:, :, None]
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        scale = self._scale_queries(by_position).to(dtype) if scales_queries else None
        return Rotation(torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype), scale)

    def _scale_queries(self, by_position: Tensor) -> Tensor:
        original = self._rope.original_max_position_embeddings
        beta = self._rope.llama_4_scaling_beta
        return compute_query_scale(by_position, beta=beta, original_max_position_embeddings=original)[:, :, None, None]


def apply_rotation(x: Tensor, rotation: Rotation, scale: bool = False) -> Tensor:
    """Rotate x [R, B, H, D] by its position ids (dimension d is paired with d + D/2); scale: queries are scaled too."""
    return _Rotate.apply(x, rotation, scale)


class _Rotate(torch.autograd.Function):
    """Rotates linearly, so that nothing of x is saved: the backward rotates by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Rotation, scale: bool) -> Tensor:
        ctx.rotation, ctx.scale = rotation, scale
        return _rotate(x, rotation, scale, forward=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(grad, ctx.rotation, ctx.scale, forward=False), None, None


def _rotate(x: Tensor, rotation: Rotation, scale: bool, forward: bool) -> Tensor:
    query_scale = rotation.query_scale if scale else None
    rotate = _compile_rotation() if x.is_cuda else rotate_heads  # model/megatron/kernel_choice.py says why
    return rotate(x.detach(), rotation.cos, rotation.sin, query_scale, forward)


@cache
def _compile_rotation() -> Callable[..., Tensor]:
    """Compile one kernel per form, with fixed sizes.

    Forms are queries or keys, forward or backward, position ids of one sequence or of each, scaled or not, of each of 8
    lengths: more than the 8 after which torch would compile no more, here and in attention (flex.py).
    """
    torch._dynamo.config.recompile_limit = max(MAX_FORMS, torch._dynamo.config.recompile_limit)
    return torch.compile(rotate_heads, dynamic=False)


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor, query_scale: Tensor | None, forward: bool) -> Tensor:
    """Return x [R, B, H, D] rotated, or rotated back; cos, sin, query_scale as in Rotation."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    rotated = torch.mul(x, cos).addcmul_(swapped, sin, value=1 if forward else -1)
    return rotated if query_scale is None else rotated.mul_(query_scale)
