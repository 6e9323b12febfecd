"""Record what code does with tensors of a pretended CUDA device: operators, and programs of torch.compile.

The code runs as on a device, except that its CUDA tensors are fake: they have shapes and no values. Tensors on the CPU
stay real. The recording can be played on the CPU (interpreting.py), where the programs' kernels are interpreted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

from launch.simulate.hooks import find_hook, replace_hook

MODE = "torch._subclasses.fake_tensor:FakeTensorMode"
PROGRAM = "torch._inductor.output_code:CompiledFxGraph"
UNRECORDED = (torch.ops.prim.device.default,)


@dataclass(frozen=True)
class View:
    """Names a tensor of a recording: a number for its storage, and how it lies in it."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Format:
    """Names one of torch's memory formats, which cannot be pickled."""

    name: str


@dataclass(frozen=True)
class Step:
    """One operator (name: `aten.add.Tensor`) or one program (name: None, text: inductor's output code).

    arguments, options: with a View for every fake tensor and the values of real ones. results: a tree of Views.
    """

    name: str | None
    text: str
    arguments: Any
    options: dict[str, Any]
    results: Any


@dataclass
class Recording:
    """What ran: given tensors by name, steps in order, and the results by name."""

    given: dict[str, tuple[View, Tensor]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    results: dict[str, View] = field(default_factory=dict)


class Recorder:
    """Makes CUDA tensors fake, leaves those of the CPU real, and records what happens to the fake ones.

    mode: that of the fake tensors. It is torch's own and not of a class derived from it, for which torch's higher-order
    operators would have no rule.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.recording = Recording()
        self._seen: list[FakeTensor] = []  # alive, so that no storage gets another's number
        self._is_paused = False

    def give(self, name: str, value: Tensor) -> Tensor:
        """Return a fake CUDA tensor in place of a real or meta one, laid out like it and with its requires_grad."""
        with self._paused(), self.mode:
            given = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        self.recording.given[name] = (self._view(given), value.detach())
        return given.requires_grad_(value.requires_grad)

    def finish(self, results: dict[str, Tensor]) -> Recording:
        """Return the recording with these results."""
        self.recording.results = {name: self._view(tensor) for name, tensor in results.items()}
        return self.recording

    def dispatch(self, run: Callable[..., Any], func: Any, types: Any, args: Any, options: dict[str, Any]) -> Any:
        """Run an operator on real tensors if all of its tensors are; else on fake ones, and record it.

        run: the mode's own way to run it on fake tensors, in which operators may call others.
        """
        if self._is_paused or func in UNRECORDED:
            return run(self.mode, func, types, args, options)
        if not _concerns_cuda(args, options):
            return func(*args, **options)
        if TracingContext.try_get() is not None:  # torch.compile is at work
            return run(self.mode, func, types, args, options)
        arguments, options_before = self._views(args), self._views(options)  # before an operator changes them
        with self._paused():
            results = run(self.mode, func, types, args, options)
        self.recording.steps.append(Step(str(func), "", arguments, options_before, self._views(results)))
        return results

    def run_program(self, program: Any, inputs: list[Any]) -> Any:
        """Stand for the call of a compiled graph: record it and return fake results."""
        arguments = self._views(list(inputs))
        with self._paused(), self.mode:
            results = _make_results(program.results, program.output_strides)
        self.recording.steps.append(Step(None, program.source_code, arguments, {}, self._views(results)))
        inputs.clear()  # as compiled graphs do, which own the list
        return results

    @contextmanager
    def _paused(self) -> Iterator[None]:
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def _views(self, tree: Any) -> Any:
        return tree_map(self._view, tree)

    def _view(self, tensor: Any) -> Any:
        if isinstance(tensor, torch.memory_format):
            return Format(str(tensor).removeprefix("torch."))
        if not isinstance(tensor, Tensor):
            return tensor
        if not isinstance(tensor, FakeTensor):
            return tensor.detach().clone()
        self._seen.append(tensor)
        storage = tensor.untyped_storage()._cdata
        return View(storage, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _concerns_cuda(args: Any, options: dict[str, Any]) -> bool:
    if any(isinstance(node, FakeTensor) for node in tree_leaves((args, options))):
        return True
    device = options.get("device")
    return device is not None and torch.device(device).type == "cuda"


def _describe_results(gm: GraphModule) -> list[Any]:
    """Return what a graph returns: size, stride, dtype and device of a tensor, anything else itself."""
    (nodes,) = gm.graph.output_node().args
    values = [node.meta["val"] if isinstance(node, Node) else node for node in nodes]  # type: ignore[union-attr]
    return [
        (tuple(value.shape), value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else value
        for value in values
    ]


def _make_results(described: list[Any], strides: Any) -> list[Any]:
    """Return fake results with the strides that inductor chose, which may differ from the graph's."""
    results = list(described)
    for number, result in enumerate(described):
        if isinstance(result, tuple):
            size, stride, dtype, device = result
            chosen = strides[number] if strides else None
            stride = stride if chosen is None else tuple(map(int, chosen))
            results[number] = torch.empty_strided(size, stride, dtype=dtype, device=device)
    return results


def record(run: Callable[[Recorder], dict[str, Tensor]]) -> Recording:
    """Record what `run` does, which gets its inputs by Recorder.give and returns its results.

    The process pretends to have a device.
    """
    recorder = Recorder()
    torch._dynamo.reset()
    with _recording(recorder), recorder.mode:
        results = run(recorder)
    return recorder.finish(results)


@contextmanager
def _recording(recorder: Recorder) -> Iterator[None]:
    """Let operators of the recorder's mode, and compiled graphs, run by way of the recorder."""
    dispatch, initialise = find_hook(f"{MODE}.__torch_dispatch__"), find_hook(f"{PROGRAM}.__init__")

    def dispatch_here(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if mode is not recorder.mode:
            return dispatch(mode, func, types, args, kwargs or {})
        return recorder.dispatch(dispatch, func, types, args, dict(kwargs or {}))

    def initialise_here(program: Any, function: Any, graph: Any, gm: GraphModule, *args: Any, **options: Any) -> None:
        initialise(program, function, graph, gm, *args, **options)
        program.results = _describe_results(gm)  # plain, so that torch can keep the program in its caches

    replacements = {
        f"{MODE}.__torch_dispatch__": dispatch_here,
        f"{PROGRAM}.__init__": initialise_here,
        f"{PROGRAM}.__call__": lambda program, inputs: recorder.run_program(program, inputs),
    }
    before = {hook: replace_hook(hook, replacement) for hook, replacement in replacements.items()}
    try:
        yield
    finally:
        for hook, original in before.items():
            replace_hook(hook, original)
