"""The operators between matmuls as plain formulas, for a compiler; every operator leaves the format of its input."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMSNorm of [..., C], computed in fp32 at least."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * up: [..., 2F] -> [..., F]."""
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, query_scale: Tensor | None) -> Tensor:
    """Rotate x [R, ..., heads, D].

    The rest is as in rotation.py's Rotation, where the first half of sin is negated.
    """
    first, second = x.chunk(2, dim=-1)
    turned = x * cos + torch.cat([second, first], dim=-1) * sin
    return turned if query_scale is None else turned * query_scale
