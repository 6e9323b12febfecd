"""Bytes of live tensors and of collectives' messages, counted by watching every operator.

Not the resident size of the process, which holds libraries, caches and freed pages too. Memory that a kernel takes and
gives back inside one operator is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.simulate.collectives import describe_collective, find_operation


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
        operation = find_operation(func)
        collective = operation and describe_collective(operation, args, str)
        if collective:
            self.by_collective[collective.operation] += collective.num_bytes
        return func(*args, **(kwargs or {}))


def bytes_of(tensors: Iterable[Tensor], known: Iterable[Tensor] = ()) -> int:
    """Return the bytes of the tensors' elements, those in storages of `known` ones left out."""
    addresses = _addresses(known)
    counted = (tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in addresses)
    return sum(tensor.numel() * tensor.element_size() for tensor in counted)


def _addresses(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
