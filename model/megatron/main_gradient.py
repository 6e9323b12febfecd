"""Gradients of weights that are added to megatron-core's gradient buffer where they are formed.

megatron-core's DistributedDataParallel gives every weight a view `main_grad` of its buffer and adds `grad` to it when a
backward has formed it. A backward that has added its own share says so with `grad_added_to_main_grad` (the protocol of
gradient_accumulation_fusion): a gradient as large as a vocabulary is then neither held twice nor copied.
"""

from typing import Any

from torch import Tensor


def find_main_gradient(weight: Tensor) -> Tensor | None:
    """The buffer to add the weight's gradient to; None where the weight is not wrapped for data parallelism."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    return getattr(weight, "main_grad", None)


def mark_added(weight: Any) -> None:
    """Says that this backward's gradient is in the buffer already."""
    weight.grad_added_to_main_grad = True


def stand_in_gradient(weight: Tensor) -> Tensor:
    """What a backward returns in place of a gradient that was added: megatron-core's hooks want one, none reads it."""
    return weight.detach()
