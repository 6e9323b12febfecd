"""Make every operator that touches the device fake, and let everything on the CPU compute as in a run.

So the trainer lays out sequences, draws noise and counts for real, while what it computes on the device has shapes,
formats and memory but no numbers. Where the trainer reads a number from the device it waits for it: each such question
is reported, and answered by 1.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
MATMULS = {aten.mm.default, aten.mm.out, aten.bmm.default, aten.addmm.default, aten.addmm_.default}
ASK_FOR_ONE_NUMBER = aten._local_scalar_dense.default


class DeviceTensors(TorchDispatchMode):
    """Runs operators on fake tensors where one of their arguments is on a CUDA device, or that device itself.

    on_question: called when the host reads a tensor of the device. While `fakes_all` is set, operators on the CPU are
    fake as well: a checkpoint copies whole optimizer states there, which no memory here could hold.
    """

    fakes_all = False

    def __init__(self, on_question: Callable[[], None]) -> None:
        super().__init__()
        self._on_question, self._fake = on_question, FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        items = tree_leaves((args, kwargs))
        if not self.fakes_all and not any(isinstance(item, FakeTensor) or _names_device(item) for item in items):
            return func(*args, **kwargs)
        if func is ASK_FOR_ONE_NUMBER:
            self._on_question()
            return _invent_number(args[0].dtype)
        if func in MATMULS:
            _check_formats(args)
        with self._fake:
            result = func(*args, **kwargs)
        if self.fakes_all or not _is_on_cpu(result):
            return result
        self._on_question()
        return args[0] if func is aten.copy_.default else _make_real(result)


def _names_device(item: object) -> bool:
    return isinstance(item, torch.device) and item.type == "cuda"


def _check_formats(args: Any) -> None:
    """Raise RuntimeError if the matrices of a product have different formats; fake tensors let that pass."""
    left, right = (tensor for tensor in args[-2:])
    if left.dtype != right.dtype:
        raise RuntimeError(f"expected matrices of the same dtype, but got {left.dtype} and {right.dtype}")


def _invent_number(dtype: torch.dtype) -> Any:
    if dtype is torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _is_on_cpu(result: Any) -> bool:
    tensors = list(_tensors(result))
    return bool(tensors) and all(tensor.device.type == "cpu" for tensor in tensors)


def _make_real(result: Any) -> Any:
    """Return real tensors of ones for what came from the device to the CPU."""
    return tree_map_only(FakeTensor, lambda fake: torch.ones(fake.shape, dtype=fake.dtype), result)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (item for item in tree_leaves(values) if isinstance(item, Tensor))
