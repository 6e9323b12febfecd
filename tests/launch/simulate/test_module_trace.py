"""The module that computes is known in the forward, in the backward, and where the backward recomputes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from launch.simulate.module_trace import ModuleTrace


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(hidden)))


class Model(nn.Module):
    def __init__(self, recomputes: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.recomputes = recomputes

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=True) if self.recomputes else layer(hidden=hidden)
        return hidden


class Places(TorchDispatchMode):
    """Collects (operator, module) of matmuls and tanh, forward and backward."""

    def __init__(self, trace: ModuleTrace) -> None:
        super().__init__()
        self.trace, self.seen = trace, list[tuple[str, str]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in ("mm", "tanh", "tanh_backward"):
            self.seen.append((name, self.trace.find_place()[0]))
        return func(*args, **(kwargs or {}))


FORWARD = [
    *(("mm", "layers.0.first"), ("tanh", "layers.0"), ("mm", "layers.0.second")),
    *(("mm", "layers.1.first"), ("tanh", "layers.1"), ("mm", "layers.1.second")),
]


def backward_of(layer: str) -> list[tuple[str, str]]:
    return [("mm", f"{layer}.second")] * 2 + [("tanh_backward", layer)] + [("mm", f"{layer}.first")] * 2


@pytest.mark.parametrize("recomputes", [False, True])
def test_every_operator_belongs_to_its_module(recomputes: bool) -> None:
    trace, model = ModuleTrace(lambda: "line"), Model(recomputes)
    trace.follow(model.named_modules())
    hidden = torch.ones(2, 4, requires_grad=True)
    for _ in range(2):  # numbers of autograd go on
        with Places(trace) as places:
            loss = model(hidden).sum()
            assert places.seen == FORWARD
            places.seen.clear()
            trace.begin_backward()
            loss.backward()
        again = (FORWARD[3:], FORWARD[:3]) if recomputes else ([], [])
        assert places.seen == [*again[0], *backward_of("layers.1"), *again[1], *backward_of("layers.0")]


def test_outside_of_any_module_there_is_none() -> None:
    assert ModuleTrace(lambda: "line").find_place() == ("", "")
