"""Follow the storages of a device: what is alive when, who made it, and the moment with most bytes.

Bytes are those of storages. What an allocator adds by rounding and fragmentation, and what a kernel takes and gives
back within itself, is not seen; the planner's --reserve-gb stands for it.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

SMALL = 64 << 10  # bytes below which nobody asks where a tensor was made


@dataclass(frozen=True)
class TensorOrigin:
    """Says where a tensor was made. line: of ours, `file:number`. module: dotted name. phase: of the step."""

    line: str
    module: str
    phase: str


NOWHERE = TensorOrigin("", "", "")


@dataclass
class Allocation:
    """Describes one storage. kind: what it is for, where that is known (weights, gradients, optimizer)."""

    num_bytes: int
    origin: TensorOrigin
    shape: tuple[int, ...]
    dtype: str
    kind: str = ""


@dataclass
class LiveMemory:
    """Holds every storage of `device_type` that operators made, in the order in which they came and went.

    find_origin: says who makes tensors now. events: (number of the allocation, whether it came). A storage that is not
    seen while it lives is not counted.
    """

    device_type: str
    find_origin: Callable[[], TensorOrigin]
    allocations: list[Allocation] = field(default_factory=list)
    events: list[tuple[int, bool]] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)

    def see(self, tensor: Tensor, kind: str = "") -> None:
        """Count the tensor's storage if it is new; kind: what it is for."""
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        number = self._numbers.get(storage._cdata)
        if number is None:
            number = self._add(tensor, storage)
        if kind and not self.allocations[number].kind:
            self.allocations[number].kind = kind

    def _add(self, tensor: Tensor, storage: object) -> int:
        num_bytes, number = tensor.untyped_storage().nbytes(), len(self.allocations)
        origin = self.find_origin() if num_bytes >= SMALL else NOWHERE
        self.allocations.append(Allocation(num_bytes, origin, tuple(tensor.shape), str(tensor.dtype)[6:]))
        self.events.append((number, True))
        key = tensor.untyped_storage()._cdata
        self._numbers[key] = number
        weakref.finalize(storage, self._remove, key, number).atexit = False
        return number

    def _remove(self, key: int, number: int) -> None:
        if self._numbers.get(key) == number:
            del self._numbers[key]
        self.events.append((number, False))

    def name(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what tensors are for that exist already."""
        for tensor in tensors:
            self.see(tensor, kind)

    def count_events(self) -> int:
        """Return the number of events so far, a moment for `find_peak`."""
        return len(self.events)

    def replay(self, start: int = 0, stop: int | None = None) -> list[int]:
        """Return the live bytes after each event from `start` to `stop`."""
        total, course = 0, []
        for index, (number, came) in enumerate(self.events[:stop]):
            total += self.allocations[number].num_bytes * (1 if came else -1)
            if index >= start:
                course.append(total)
        return course

    def find_alive(self, moment: int) -> list[Allocation]:
        """Return what is alive after event number `moment`, the largest first."""
        alive: set[int] = set()
        for number, came in self.events[: moment + 1]:
            (alive.add if came else alive.discard)(number)
        return sorted((self.allocations[number] for number in alive), key=lambda item: -item.num_bytes)
