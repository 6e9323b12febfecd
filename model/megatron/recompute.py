"""Recompute what a layer computes between its matmuls in the backward pass (parallel.recompute=elementwise).

A norm's output and SwiGLU's output are saved for one purpose each: the weight's gradient of the matmul that consumes
them. Both follow in one pass from tensors that are saved anyway, the norm's input and fc1's output. So the producer of
such a tensor records on it how to recompute it, and autograd saves that record instead; the backward reads the same
values, bit for bit.

Exactly that one saved tensor is replaced. saved_tensors_hooks around the matmul would replace its weight too, which
comes back without its attributes (`main_grad` among them). megatron-core's CheckpointWithoutOutput compiles C++ in the
first backward, and holds what it recomputed until its producer's backward is done, not its consumer's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

Build = Callable[..., nn.Module]


@dataclass(frozen=True)
class Origin:
    """Says how to recompute a tensor.

    producer: a module without randomness or state but its weights. x: its input, detached.
    """

    producer: nn.Module
    x: Tensor

    def recompute(self) -> Tensor:
        """Return the tensor again, by the operators used before; without gradients others might be chosen."""
        with torch.enable_grad():
            return self.producer.forward(self.x).detach()


def recompute_elementwise(layer: ModuleSpec) -> None:
    """Change the spec of a layer. A norm within the matmul that consumes it (Transformer Engine's) stays as it is."""
    submodules: Any = layer.submodules
    attention, mlp = submodules.self_attention.submodules, submodules.mlp.keywords["submodules"]
    mlp.activation_func = _with_hook(mlp.activation_func, record_origin)
    mlp.linear_fc2 = _with_hook(mlp.linear_fc2, save_origin)
    if submodules.input_layernorm is IdentityOp:
        return
    submodules.input_layernorm = _with_hook(submodules.input_layernorm, record_origin)
    submodules.pre_mlp_layernorm = _with_hook(submodules.pre_mlp_layernorm, record_origin)
    attention.linear_qkv = _with_hook(attention.linear_qkv, save_origin)
    mlp.linear_fc1 = _with_hook(mlp.linear_fc1, save_origin)


def _with_hook(build: Build, hook: Callable[[nn.Module, Any, Any], None]) -> Build:
    def build_with_hook(*args: Any, **options: Any) -> nn.Module:
        module = build(*args, **options)
        module.register_forward_hook(hook)
        return module

    return build_with_hook


def record_origin(producer: nn.Module, inputs: tuple[Tensor], output: Any) -> None:
    """Record on the producer's output how to recompute it (forward hook)."""
    if output.requires_grad:
        (x,) = inputs
        output.origin = Origin(producer, x.detach().requires_grad_(x.requires_grad))


def save_origin(consumer: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Any]) -> None:
    """Let autograd save the origin of the consumer's input instead of the input (forward hook).

    A consumer that saves something else (8-bit copies) continues to do so.
    """
    consumed = inputs[0]
    origin: Origin | None = getattr(consumed, "origin", None)
    if origin is None:
        return
    for node in _nodes_between(outputs[0], consumed):
        for tensor, saved in zip(node.saved_tensors, node._raw_saved_tensors, strict=True):
            if tensor is not None and _same_values(tensor, consumed):
                saved.register_hooks(lambda tensor: (origin, tensor.shape), _unpack)


def _unpack(packed: tuple[Origin, torch.Size]) -> Tensor:
    origin, shape = packed
    return origin.recompute().view(shape)


def _nodes_between(output: Tensor, consumed: Tensor) -> Iterator[Any]:
    """Yield the autograd functions written in Python by which `output` came from `consumed`."""
    end, waiting = consumed.grad_fn, [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node is end:
            continue
        if hasattr(node, "_raw_saved_tensors"):
            yield node
        waiting += [before for before, _ in node.next_functions]


def _same_values(tensor: Tensor, consumed: Tensor) -> bool:
    """Return whether a tensor is `consumed`, perhaps in another shape."""
    same = tensor.untyped_storage().data_ptr() == consumed.untyped_storage().data_ptr()
    return same and tensor.numel() == consumed.numel() and tensor.dtype == consumed.dtype
