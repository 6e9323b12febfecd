"""What a case is: code of ours that a run on CUDA compiles, its inputs, and what it must compute."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Draw = Callable[..., Tensor]  # sizes -> a tensor


class Case(Protocol):
    """Something that torch compiles on CUDA.

    name: `kind/form/shape`. draw: returns the inputs by name, on the CPU. run: maps inputs on a device to results, with
    our own code for that device. compute_reference: maps float64 inputs to the same results, densely.
    """

    @property
    def name(self) -> str: ...

    def draw(self, draw: Draw) -> Tensors: ...

    def run(self, inputs: Tensors) -> Tensors: ...

    def compute_reference(self, inputs: Tensors) -> Tensors: ...


def draw_values(dtype: torch.dtype, seed: int = 0) -> Draw:
    """Return what draws normal values for an interpreted case."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator).to(dtype)


def draw_shapes(dtype: torch.dtype) -> Draw:
    """Return what draws shapes alone, for a case that is only compiled."""
    return lambda *size: torch.empty(size, dtype=dtype, device="meta")


def differentiate(function: Callable[..., Tensor], inputs: Tensors, gradient: Tensor) -> Tensors:
    """Return the output of `function` of the inputs that require gradients, and their gradients, by name."""
    differentiated = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    output = function(*differentiated.values())
    gradients = torch.autograd.grad(output, list(differentiated.values()), gradient)
    by_name = {f"d{name}": value for name, value in zip(differentiated, gradients, strict=True)}
    return {"output": output, **by_name}
