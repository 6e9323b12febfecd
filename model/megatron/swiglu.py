"""SwiGLU that keeps its input alone for the backward pass: silu(gate) is computed again there.

megatron-core's unfused one keeps silu(gate), a copy of `up` and views besides: 5 tensors of the inner width with the
product's own, here 3. Its fused one is a torch.compile of the same formulas. Shapes: x [..., 2F] is [gate | up].
Source: arXiv 2002.05202.
"""

from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from torch import Tensor
from torch.nn.functional import silu


class SwiGLU(torch.nn.Module):
    """An activation as megatron-core's MLP builds and calls one."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2F] -> silu(gate) * up [..., F]."""
        return _SwiGLU.apply(x)


class CompiledSwiGLU(SwiGLU):
    """megatron-core's, as its MLP computes it where bias_activation_fusion is on."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2F] -> silu(gate) * up [..., F]."""
        return bias_swiglu_impl(x, None)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.ops.aten.silu_backward(grad * up, gate, grad_input=grad_gate)
        torch.mul(silu(gate), grad, out=grad_up)
        return grad_x
