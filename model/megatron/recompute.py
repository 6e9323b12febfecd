"""What a layer computes between its products is made again in the backward pass (parallel.recompute=elementwise).

A norm's output and SwiGLU's product are kept for one thing each: the weight's gradient of the product that reads them.
Both follow in one pass from what is kept anyway, the norm's input and fc1's output. So what makes such a tensor leaves
its origin on it, and autograd keeps the origin in its place; the backward reads the same values, bit for bit.

Exactly that one saved tensor is replaced. saved_tensors_hooks around the product would replace its weight too, which
comes back without its attributes (`main_grad` among them). megatron-core's CheckpointWithoutOutput compiles C++ in the
first backward, and holds what it made again until its maker's backward is done, not its reader's.
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
    """Of a tensor. maker: a module without chance or state but its weights. x: what it was given, cut off the graph."""

    maker: nn.Module
    x: Tensor

    def make_again(self) -> Tensor:
        """By the same operators as before, which may be others where no gradient is asked for."""
        with torch.enable_grad():
            return self.maker.forward(self.x).detach()


def recompute_elementwise(layer: ModuleSpec) -> None:
    """Changes the spec of a layer. A norm within the product that reads it (Transformer Engine's) stays as it is."""
    submodules: Any = layer.submodules
    attention, mlp = submodules.self_attention.submodules, submodules.mlp.keywords["submodules"]
    mlp.activation_func = _with_hook(mlp.activation_func, leave_origin)
    mlp.linear_fc2 = _with_hook(mlp.linear_fc2, keep_origin)
    if submodules.input_layernorm is IdentityOp:
        return
    submodules.input_layernorm = _with_hook(submodules.input_layernorm, leave_origin)
    submodules.pre_mlp_layernorm = _with_hook(submodules.pre_mlp_layernorm, leave_origin)
    attention.linear_qkv = _with_hook(attention.linear_qkv, keep_origin)
    mlp.linear_fc1 = _with_hook(mlp.linear_fc1, keep_origin)


def _with_hook(build: Build, hook: Callable[[nn.Module, Any, Any], None]) -> Build:
    def build_with_hook(*args: Any, **options: Any) -> nn.Module:
        module = build(*args, **options)
        module.register_forward_hook(hook)
        return module

    return build_with_hook


def leave_origin(maker: nn.Module, inputs: tuple[Tensor], made: Any) -> None:
    """Forward hook of what makes a tensor."""
    if made.requires_grad:
        (x,) = inputs
        made.origin = Origin(maker, x.detach().requires_grad_(x.requires_grad))


def keep_origin(reader: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Any]) -> None:
    """Forward hook of the product that reads it. A reader that keeps something else (8-bit copies) goes on doing so."""
    made = inputs[0]
    origin: Origin | None = getattr(made, "origin", None)
    if origin is None:
        return
    for node in _nodes_between(outputs[0], made):
        for tensor, saved in zip(node.saved_tensors, node._raw_saved_tensors, strict=True):
            if tensor is not None and _same_values(tensor, made):
                saved.register_hooks(lambda tensor: (origin, tensor.shape), _unpack)


def _unpack(packed: tuple[Origin, torch.Size]) -> Tensor:
    origin, shape = packed
    return origin.make_again().view(shape)


def _nodes_between(output: Tensor, made: Tensor) -> Iterator[Any]:
    """Autograd functions written in Python by which `output` came from `made`."""
    end, waiting = made.grad_fn, [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node is end:
            continue
        if hasattr(node, "_raw_saved_tensors"):
            yield node
        waiting += [before for before, _ in node.next_functions]


def _same_values(tensor: Tensor, made: Tensor) -> bool:
    """Whether it is `made`, perhaps in another shape."""
    same = tensor.untyped_storage().data_ptr() == made.untyped_storage().data_ptr()
    return same and tensor.numel() == made.numel() and tensor.dtype == made.dtype
