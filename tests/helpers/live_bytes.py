"""Bytes of live tensors and of collectives' messages, counted by watching every operator.

Not the resident size of the process, which holds libraries, caches and freed pages too. Memory that a kernel takes and
gives back inside one operator is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The operators that torch.distributed's functions call: the names of what they do.
COLLECTIVES = {
    "c10d.allreduce_": "all-reduce",
    "c10d._allgather_base_": "all-gather",
    "c10d.allgather_into_tensor_coalesced_": "all-gather",
    "c10d._reduce_scatter_base_": "reduce-scatter",
    "c10d.reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "c10d.send": "send",
}


class LiveBytes(TorchDispatchMode):
    """While it is entered: `now`, bytes of storages made since then that are still alive, and `peak`, the most at once.

    known: tensors that exist already and do not count (weights, gradient buffers).
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, tuple[Any, int]] = {}
        self._known = _addresses(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor):
                self._count(item)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or storage.data_ptr() in self._known or size == 0:
            return
        self._live[key] = (weakref.ref(storage, self._forget(key)), size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self.now -= self._live.pop(key)[1]

        return forget


class SentBytes(TorchDispatchMode):
    """While it is entered: bytes of the whole messages of collectives, by what they do."""

    def __init__(self) -> None:
        super().__init__()
        self.by_collective: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = COLLECTIVES.get(str(func).removesuffix(".default"))
        if name is not None and _group_size(args) > 1:
            tensors = [item for item in tree_leaves(args) if isinstance(item, Tensor)]
            self.by_collective[name] += max(tensor.numel() * tensor.element_size() for tensor in tensors)
        return func(*args, **(kwargs or {}))


def _group_size(arguments: tuple[Any, ...]) -> int:
    """Return the number of ranks of the process group among an operator's arguments."""
    groups = [item for item in tree_leaves(arguments) if isinstance(item, torch.ScriptObject)]
    return max(_size_if_group(group) for group in groups)


def _size_if_group(value: Any) -> int:
    try:
        return dist.ProcessGroup.unbox(value).size()
    except RuntimeError:  # another kind of object: the operation of a reduction
        return 0


def bytes_of(tensors: Iterable[Tensor], known: Iterable[Tensor] = ()) -> int:
    """Return the bytes of the tensors' elements, those in storages of `known` ones left out."""
    addresses = _addresses(known)
    counted = (tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in addresses)
    return sum(tensor.numel() * tensor.element_size() for tensor in counted)


def _addresses(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
