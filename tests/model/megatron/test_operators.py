"""RMSNorm and SwiGLU against torch's own operators in float64: values, gradients, and what they keep."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from model.megatron.operators import RMSNorm, SwiGLU, TorchRMSNorm

POSITIONS, BATCH, WIDTH, EPS = 7, 2, 12, 1e-5


def build_norm(dtype: torch.dtype) -> RMSNorm:
    """Build a norm with weights that are not all alike."""
    settings: Any = SimpleNamespace(params_dtype=dtype, sequence_parallel=True)
    norm = RMSNorm(settings, WIDTH, eps=EPS)
    torch.nn.init.normal_(norm.weight, mean=1.0, generator=torch.Generator().manual_seed(1))
    return norm


def draw(dtype: torch.dtype) -> Tensor:
    """Draw an input [R, B, H], with a gradient."""
    x = torch.randn(POSITIONS, BATCH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def saved_bytes(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Return the bytes of the tensors saved for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel() * t.element_size()), lambda t: t):
        function(x)
    return sum(sizes)


def test_norm_and_its_gradients_equal_torchs() -> None:
    norm, x, its_x = build_norm(torch.float64), draw(torch.float64), draw(torch.float64)
    weight = norm.weight.detach().clone().requires_grad_()
    expected, actual = rms_norm(its_x, (WIDTH,), weight, EPS), norm(x)
    torch.testing.assert_close(actual, expected)
    grad = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    mine = torch.autograd.grad(actual, (x, norm.weight), grad)
    torch.testing.assert_close(mine, torch.autograd.grad(expected, (its_x, weight), grad))


def test_norm_of_half_precision_is_computed_in_fp32() -> None:
    norm, x = build_norm(torch.bfloat16), draw(torch.bfloat16)
    expected = rms_norm(x.float(), (WIDTH,), norm.weight.float(), EPS).bfloat16()
    assert torch.equal(norm(x), expected)
    weight: Any = norm.weight
    assert weight.sequence_parallel is True


def test_norm_keeps_its_input_and_a_number_per_row() -> None:
    x = draw(torch.float32)
    assert saved_bytes(build_norm(torch.float32), x) == 4 * (x.numel() + WIDTH + POSITIONS * BATCH)


def test_swiglu_and_its_gradient_equal_torchs() -> None:
    x, its_x = draw(torch.float64), draw(torch.float64)
    gate, up = its_x.chunk(2, dim=-1)
    expected, actual = silu(gate) * up, SwiGLU(None)(x)
    torch.testing.assert_close(actual, expected)
    grad = torch.linspace(-1, 1, actual.numel(), dtype=torch.float64).view_as(actual)
    torch.testing.assert_close(torch.autograd.grad(actual, x, grad), torch.autograd.grad(expected, its_x, grad))


def test_swiglu_keeps_its_input_alone() -> None:
    x = draw(torch.float32)
    assert saved_bytes(SwiGLU(None), x) == 4 * x.numel()


def test_what_a_gpu_uses_in_their_place_is_the_same_function() -> None:
    """Compare with torch's norm and megatron-core's SwiGLU, which a GPU compiles."""
    norm, x, grad = build_norm(torch.float64), draw(torch.float64), draw(torch.float64).detach()
    settings: Any = SimpleNamespace(params_dtype=torch.float64, sequence_parallel=True)
    torchs = TorchRMSNorm(settings, WIDTH, eps=EPS)
    torchs.load_state_dict(norm.state_dict())
    weight: Any = torchs.weight
    assert weight.sequence_parallel is True
    with torch.compiler.set_stance("force_eager"):
        compared = [
            (norm, torchs, grad),
            (SwiGLU(None), lambda x: bias_swiglu_impl(x, None, False, False), grad[..., : WIDTH // 2]),
        ]
        for ours, its, grad_out in compared:
            torch.testing.assert_close(its(x), ours(x))
            (mine,) = torch.autograd.grad(ours(x), x, grad_out)
            (theirs,) = torch.autograd.grad(its(x), x, grad_out)
            torch.testing.assert_close(theirs, mine)
