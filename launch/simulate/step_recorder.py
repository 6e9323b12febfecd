"""Watch every operator of a step: live bytes, collectives, FLOPs by module, and questions of the host to its device.

Works on fake tensors and on real ones alike, so that what is simulated can be compared with a real run.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from launch.simulate.collectives import Collective, describe_collective, find_operation
from launch.simulate.hooks import find_hook, replace_hook
from launch.simulate.live_memory import LiveMemory, TensorOrigin
from launch.simulate.module_trace import ModuleTrace

ROOT = Path(__file__).resolve().parents[2]
OWN = tuple(f"{ROOT / folder}/" for folder in ("conf", "data_pipeline", "lora", "model", "pretrain", "tests"))
TRAINER = f"{ROOT}/pretrain/trainer.py"
SCHEDULES = "megatron.core.pipeline_parallel.schedules"


@dataclass(frozen=True)
class Question:
    """Names a point where the host waits for its device: a line of ours, the function around it as `file:name`."""

    line: str
    function: str
    phase: str


@dataclass
class StepRecorder:
    """Holds what was seen. flops: by dotted name of the module that computed, forward and backward."""

    device_type: str
    memory: LiveMemory = field(init=False)
    modules: ModuleTrace = field(init=False)
    collectives: list[Collective] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    flops: Counter[str] = field(default_factory=Counter)
    _phase: str = ""
    _microbatches: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.memory = LiveMemory(self.device_type, self._find_origin)
        self.modules = ModuleTrace(find_line)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record while the block runs."""
        with ExitStack() as stack:
            for name in ("forward_step", "backward_step"):
                stack.enter_context(self._naming_phase(name))
            stack.enter_context(_Watch(self))
            yield

    def begin(self) -> None:
        """Forget collectives, questions and FLOPs: a step begins. What is alive stays."""
        self.collectives, self.questions = [], []
        self.flops.clear()
        self._microbatches.clear()

    def add_flops(self, number: int) -> None:
        """Count FLOPs for the module that computes now."""
        self.flops[self.modules.find_place()[0]] += number

    def ask(self) -> None:
        """Record that the host reads from its device now."""
        frame = _find_own_frame()
        line, function = (_describe(frame), f"{_path(frame)}:{frame.f_code.co_qualname}") if frame else ("?", "?")
        self.questions.append(Question(line, function, self._find_phase()))

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Record one operator."""
        operation = find_operation(func)
        collective = operation and describe_collective(operation, args, find_line)
        if collective:
            self.collectives.append(collective)
            for item in tree_leaves(args[:2]):
                if isinstance(item, Tensor) and item.numel() * item.element_size() == collective.num_bytes:
                    self.memory.see(item, "communication")
        tensors = [item for item in tree_leaves(result) if isinstance(item, Tensor)]
        count_flops = _find_flop_counter(func)
        if count_flops and tensors and tensors[0].device.type == self.device_type:
            self.add_flops(count_flops(*args, **kwargs, out_val=result))
        for tensor in tensors:
            self.memory.see(tensor)

    def _find_origin(self) -> TensorOrigin:
        module, called_by = self.modules.find_place()
        return TensorOrigin(find_line() or called_by, module, self._find_phase())

    def _find_phase(self) -> str:
        return self._phase or _find_part_of_step()

    @contextmanager
    def _naming_phase(self, name: str) -> Iterator[None]:
        """Count the calls of megatron-core's function that takes a microbatch through a chunk, forward or backward."""
        hook, direction = f"{SCHEDULES}:{name}", name.removesuffix("_step")
        original = find_hook(hook)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._microbatches[direction] += 1
            self._phase = f"{direction} {self._microbatches[direction]}"
            self.modules.begin_backward()
            try:
                return original(*args, **kwargs)
            finally:
                self._phase = ""

        replace_hook(hook, counted)
        try:
            yield
        finally:
            replace_hook(hook, original)


class _Watch(TorchDispatchMode):
    def __init__(self, recorder: StepRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._recorder.note(func, args, kwargs or {}, result)
        return result


def _find_flop_counter(func: Any) -> Any:
    """Return torch's function that counts an operator's FLOPs, which it lists for those that do not work in place."""
    name = func._overloadpacket.__name__.removesuffix("_")
    return flop_registry.get(getattr(getattr(torch.ops, func.namespace), name, None))


def find_line() -> str:
    """Return the innermost line of ours that runs now, `file:number`; empty if this thread runs none."""
    frame = _find_own_frame()
    return _describe(frame) if frame else ""


def _find_own_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(OWN):
        frame = frame.f_back
    return frame


def _find_part_of_step() -> str:
    """Return the name of the function that the trainer's step has called."""
    frame, called = sys._getframe(1), ""
    while frame is not None and frame.f_code.co_filename != TRAINER:
        if frame.f_code.co_filename.startswith(OWN):
            called = frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return called


def _path(frame: FrameType) -> str:
    return str(Path(frame.f_code.co_filename).relative_to(ROOT))


def _describe(frame: FrameType) -> str:
    return f"{_path(frame)}:{frame.f_lineno}"
