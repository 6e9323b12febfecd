"""Say which module computes at any moment, in the forward and in the backward pass.

torch's ModuleTracker finds a module's backward by the tensors among its positional arguments, and megatron-core passes
hidden states by name. Here a module is noted with the numbers that autograd gives to the nodes made meanwhile; in the
backward pass the number of the node that runs leads back to it.
"""

import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Place = tuple[str, str]  # dotted name of a module, line of ours that called it
NO_TASK = -1


@dataclass
class _Thread:
    """What one thread has entered, and from which autograd number on each place holds."""

    entered: list[Place] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)

    def note(self, place: Place) -> None:
        self.numbers.append(torch.autograd._get_sequence_nr())
        self.places.append(place)

    def find(self, number: int) -> Place:
        index = bisect_right(self.numbers, number) - 1
        return self.places[index] if index >= 0 else ("", "")


class ModuleTrace:
    """Follows the modules that `follow` was given.

    find_line: returns the line of ours that runs now.
    """

    def __init__(self, find_line: Callable[[], str]) -> None:
        self._find_line = find_line
        self._threads: dict[int, _Thread] = defaultdict(_Thread)
        self._main = threading.get_ident()
        self._outer_task = NO_TASK

    def follow(self, named_modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Note from now on when these modules compute."""
        for name, module in named_modules:
            module.register_forward_pre_hook(self._enter(name), prepend=True)
            module.register_forward_hook(self._leave(), always_call=True)

    def begin_backward(self) -> None:
        """Note that the main thread starts a backward pass; those within it belong to recomputed modules."""
        self._outer_task = NO_TASK

    def find_place(self) -> Place:
        """Return the module that computes now and the line of ours that called it; empty outside of any."""
        mine, task = self._threads[threading.get_ident()], self._find_task()
        if mine.entered:
            return mine.entered[-1]
        node: Any = torch._C._current_autograd_node() if task != NO_TASK else None
        if node is None:
            return "", ""
        # What the backward pass recomputes has nodes made by its own thread, and a backward pass of its own.
        made_by = mine if task != self._outer_task else self._threads[self._main]
        return made_by.find(node._sequence_nr())

    def _find_task(self) -> int:
        """Return the number of the backward pass that runs, and note it if it is the outer one."""
        task = torch._C._current_graph_task_id()
        if self._outer_task == NO_TASK:
            self._outer_task = task
        return task

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._find_task()  # a module that is entered in a backward pass is recomputed by the outer one
            mine = self._threads[threading.get_ident()]
            mine.entered.append((name, self._find_line()))
            mine.note(mine.entered[-1])

        return enter

    def _leave(self) -> Callable[..., None]:
        def leave(*_: Any) -> None:
            mine = self._threads[threading.get_ident()]
            mine.entered.pop()
            mine.note(mine.entered[-1] if mine.entered else ("", ""))

        return leave
