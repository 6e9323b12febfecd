"""Bytes of live tensors, counted by watching every operator that makes one: what an allocator would have to hand out.

Not the resident size of the process, which holds libraries, caches and freed pages too. Memory a kernel takes and gives
back inside one operator is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is entered: bytes of storages made since then that are still alive, and the most there were at once.

    known: tensors that exist already and do not count (weights, gradient buffers, inputs).
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self._live: dict[int, tuple[Any, int, str]] = {}
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf, str(func))
        return result

    def _count(self, tensor: Tensor, maker: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or storage.data_ptr() in self._known or size == 0:
            return
        self._live[key] = (
            weakref.ref(storage, self._forget(key)),
            size,
            f"{maker} {list(tensor.shape)} {tensor.dtype}",
        )
        self.now += size
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak = Counter()
            for _, its_size, what in self._live.values():
                self.at_peak[what] += its_size

    def _forget(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self.now -= self._live.pop(key)[1]

        return forget
