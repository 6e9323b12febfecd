"""Operators between the matmuls, forward and backward at the joint step's positions: ours, and compiled plain formulas.

Which is faster decides whether model/ should hand its formulas to torch.compile on CUDA.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from model.attention.rotation import RotationBuilder, apply_rotation
from model.attention.visibility import build_regular_layout
from model.megatron.operators import _RMSNorm, _SwiGLU
from tests.bench.gpu import plain
from tests.bench.gpu.meter import measure
from tests.bench.gpu.steps import Workbench
from tests.bench.joint.cases import BLOCK_SIZE, SEED

NORM, SWIGLU, ROTATION = "RMSNorm", "SwiGLU", "rotation"
OURS, EAGER, COMPILED, TORCH = "ours", "CPU's form", "compiled", "torch's fused"


def list_ways() -> list[str]:
    """List the names of all ways."""
    own = {NORM: EAGER, SWIGLU: EAGER, ROTATION: OURS}
    both = [f"{operator}, {way}" for operator, form in own.items() for way in (form, COMPILED)]
    return [*both, f"{NORM}, {TORCH}"]


def measure_operators(bench: Workbench, length: int) -> dict[str, Any]:
    """Return the results of measure by "operator, way"."""
    model, device, num_positions = bench.settings.model, bench.meter.device, 2 * length
    decoder: Any = bench.side.module.decoder
    weights = decoder.final_layernorm.weight.detach().requires_grad_()
    positions = build_regular_layout(length, BLOCK_SIZE).position_ids.repeat(1, 2).to(device)
    rotation = RotationBuilder(model.rope, model.head_dim).build(positions, weights.dtype)
    hidden, inner, query = (
        _draw((num_positions, 1, *shape), device, weights.dtype)
        for shape in ((model.hidden_size,), (2 * model.ffn_hidden_size,), (model.num_attention_heads, model.head_dim))
    )
    eps = model.rms_norm_eps
    compile_plain: Any = (lambda function: torch.compile(function, dynamic=False)) if bench.meter.is_cuda else _keep
    norm, swiglu, rotate = (compile_plain(function) for function in (plain.norm, plain.swiglu, plain.rotate))
    ways: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        f"{NORM}, {EAGER}": (lambda: _RMSNorm.apply(hidden, weights, eps), [hidden, weights]),
        f"{NORM}, {COMPILED}": (lambda: norm(hidden, weights, eps), [hidden, weights]),
        f"{NORM}, {TORCH}": (lambda: rms_norm(hidden, weights.shape, weights, eps), [hidden, weights]),
        f"{SWIGLU}, {EAGER}": (lambda: _SwiGLU.apply(inner), [inner]),
        f"{SWIGLU}, {COMPILED}": (lambda: swiglu(inner), [inner]),
        f"{ROTATION}, {OURS}": (lambda: apply_rotation(query, rotation, True), [query]),
        f"{ROTATION}, {COMPILED}": (lambda: rotate(query, rotation.cos, rotation.sin, rotation.query_scale), [query]),
    }
    runs = {name: _both_ways(function, inputs) for name, (function, inputs) in ways.items()}
    return measure(bench.meter, runs, bench.settings.rounds, [*bench.known(), hidden, inner, query])


def _keep(function: Any) -> Any:
    return function


def _draw(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(SEED)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()


def _both_ways(function: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Run forward and backward with the output itself as its gradient: it has its shape and is not constant."""

    def run() -> object:
        output = function()
        return torch.autograd.grad(output, inputs, output.detach())

    return run
