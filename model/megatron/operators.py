"""Operators that hold less memory than torch's: RMSNorm, SwiGLU, and gradients formed in megatron-core's buffer.

RMSNorm saves its input and one number per position for the backward pass. torch composes it of six operators on the CPU
and saves two more tensors of the input's size in fp32; forward and backward of [1024, 256] on one thread take 0.4 ms
instead of 1.5 ms. SwiGLU saves its input alone and recomputes silu(gate): megatron-core's unfused one saves silu(gate),
a copy of `up` and views in addition, 5 tensors of the inner width with the matmul's own, here 3.

megatron-core's DistributedDataParallel gives every weight a view `main_grad` of its buffer and adds `grad` to it when a
backward has formed it. A backward that has added its own share sets `grad_added_to_main_grad` (the protocol of
gradient_accumulation_fusion): a gradient as large as a vocabulary is then neither held twice nor copied.
Shapes: H hidden size, F inner width of the MLP. Sources: RMSNorm arXiv 1910.07467, SwiGLU arXiv 2002.05202.
"""

from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import silu


class TorchRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, one kernel each way on CUDA, with the mark that megatron-core's gradient reduction looks for.

    Normalises the last dimension, in fp32 at least.

    megatron-core's own wrapper rejects sequence parallelism, although all it takes is summing the weight's gradient
    over the tensor-parallel ranks, which `sequence_parallel` on the weight asks for.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class RMSNorm(TorchRMSNorm):
    """RMSNorm for the CPU, which saves its input and one number per position."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., H] to the same shape and format."""
        assert self.eps is not None
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Compute y = x * scale * weight with scale = 1 / sqrt(mean(x^2) + eps)."""
        exact = x.to(_exact(x))
        scale = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (exact * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Compute dx = scale * (g * weight - n * mean(g * weight * n)) and dweight = sum of g * n; n = x * scale."""
        x, weight, scale = ctx.saved_tensors
        grad, exact_weight = grad.to(scale.dtype), weight.to(scale.dtype)
        normalised = x.to(scale.dtype) * scale
        grad_x = grad * normalised
        mean = (grad_x @ exact_weight).div_(x.shape[-1])[..., None]
        grad_weight = grad_x.flatten(0, -2).sum(0)
        torch.mul(grad, exact_weight, out=grad_x)
        grad_x.addcmul_(normalised, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class SwiGLU(torch.nn.Module):
    """SwiGLU that saves its input alone, as megatron-core's MLP builds and calls an activation."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Map [gate | up] [..., 2F] to silu(gate) * up [..., F]."""
        return _SwiGLU.apply(x)


class CompiledSwiGLU(SwiGLU):
    """megatron-core's SwiGLU, as its MLP computes it where bias_activation_fusion is on."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [gate | up] [..., 2F] to silu(gate) * up [..., F]."""
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


def find_main_gradient(weight: Tensor) -> Tensor | None:
    """Return the buffer to add the weight's gradient to; None if the weight is not wrapped for data parallelism."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    return getattr(weight, "main_grad", None)


def mark_added(weight: Any) -> None:
    """Record that this backward's gradient is in the buffer already."""
    weight.grad_added_to_main_grad = True


def stand_in_gradient(weight: Tensor) -> Tensor:
    """Return a stand-in for a gradient that was added: megatron-core's hooks want one, but do not read it."""
    return weight.detach()
