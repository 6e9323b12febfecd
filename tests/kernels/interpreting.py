"""Play recordings on the CPU; the kernels of their programs go through triton's interpreter.

For a process of its own: triton reads TRITON_INTERPRET when it is imported, and compiles nothing afterwards. Kernels
run as they were compiled, with the same tiles. float16 stands for bfloat16, whose matmuls the interpreter (triton
3.7.1) computes wrong.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import importlib.util
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_leaves, tree_map

from launch.simulate.hooks import find_hook, replace_hook
from tests.kernels.recording import Format, Recording, Step, View

HEURISTICS = "torch._inductor.runtime.triton_heuristics"
HELPERS = "torch._inductor.runtime.triton_helpers"
DECORATORS = ("pointwise", "reduction", "persistent_reduction", "cooperative_reduction", "template")
# What inductor's programs say to a device, and what is said here instead.
ON_CPU = {
    "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": "get_raw_stream = lambda device: 0",
    "empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda": (
        "empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)"
    ),
    "torch.cuda._DeviceGuard(0)": "contextlib.nullcontext()",
    "torch.cuda.set_device(0)": "pass",
    "async_compile = AsyncCompile()": "async_compile = INTERPRETER",
    "async_compile.wait(globals())": "",
    "device(type='cuda', index=0)": "device(type='cpu')",
}
Configs = dict[str, dict[str, int]]  # sizes of tiles by kernel


class InterpretedKernel:
    """Stands for one kernel of a program and is called as inductor's launcher is."""

    def __init__(self, name: str, source: str, config: dict[str, int], folder: Path) -> None:
        path = folder / f"{name}.py"  # the interpreter reads a kernel's source from its file
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._function, self._metadata = getattr(module, name)
        self._config = config

    def run(self, *arguments: Any, stream: int = 0) -> None:
        """Run all blocks of the grid: templates get it as the last three arguments, others from their sizes."""
        if "fixed_grid" in self._metadata:
            self._function[arguments[-3:]](*arguments[:-3])
            return
        names = self._function.arg_names
        grid = find_hook(f"{HEURISTICS}:GridExpr").from_meta(self._metadata, self._config)
        tiles = {name: size for name, size in self._config.items() if name in names}
        self._function[grid.eval_slow(dict(zip(names, arguments, strict=False)))](*arguments, **tiles)


def prepare() -> None:
    """Let kernels' sources be imported without a device: their decorators keep what describes the grid, no more."""

    def keep(*_: Any, inductor_meta: Any = None, **__: Any) -> Callable[[Any], Any]:
        return lambda function: (function, inductor_meta)

    for name in DECORATORS:
        replace_hook(f"{HEURISTICS}:{name}", keep)
    replace_hook(f"{HELPERS}:set_driver_to_gpu", lambda: None)
    # The interpreter has no functions of NVIDIA's libdevice.
    replace_hook(f"{HELPERS}:libdevice", SimpleNamespace(rsqrt=lambda x: 1 / tl.sqrt(x), exp=lambda x: tl.exp(x)))


def load_program(text: str, configs: Configs, folder: Path) -> Callable[[list[Any]], Any]:
    """Return the `call` of one of inductor's programs, which maps CPU tensors to its results."""
    for old, new in ON_CPU.items():
        text = text.replace(old, new)
    text = re.sub(r"torch\.ops\.(aten\._scaled_dot_product_\w+\.default)", r'stand_for_attention("\1")', text)

    def interpret(name: str, source: str, **_: Any) -> InterpretedKernel:
        return InterpretedKernel(name, source, configs[name], folder)

    names = {
        "INTERPRETER": SimpleNamespace(triton=interpret),
        "stand_for_attention": stand_for_attention,
        "contextlib": contextlib,
        "__name__": "program",
    }
    exec(compile(text, "program", "exec"), names)
    return names["call"]  # type: ignore[return-value]


def stand_for_attention(name: str) -> Callable[..., tuple[Tensor]]:
    """Return what computes on the CPU what one of CUDA's own attention operators does, which is not compiled.

    name: `aten._scaled_dot_product_efficient_attention.default`, for example. Only the output is returned.
    """
    parameters = [argument.name for argument in _find_operator(name)._schema.arguments]

    def attend(*arguments: Any, **options: Any) -> tuple[Tensor]:
        given = dict(zip(parameters, arguments, strict=False)) | options
        query, key, value = (given[parameter] for parameter in ("query", "key", "value"))
        mask, causal = given.get("attn_bias"), given.get("is_causal", False)
        attended = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=given.get("scale"), enable_gqa=True
        )
        if "cudnn" in name:  # which lays its output out as the query is
            return (torch.empty_like(query).copy_(attended),)
        return (attended.transpose(1, 2).contiguous().transpose(1, 2),)

    return attend


class _Player:
    """Holds the storages of one recording while it is played."""

    def __init__(self, configs: Configs, folder: Path) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._configs, self._folder = configs, folder

    def bind(self, view: View, value: Tensor) -> None:
        """Let the view's storage be that of a real tensor; raise AssertionError if they are laid out differently."""
        if view.storage not in self._storages:
            strides = zip(view.size, view.stride, value.stride(), strict=True)
            assert view.size == value.shape and all(size == 1 or mine == its for size, mine, its in strides), view
            self._storages[view.storage] = value.untyped_storage()

    def take(self, node: Any) -> Any:
        """Return the real tensor of a view, the CPU for a device, anything else as it is."""
        if isinstance(node, torch.device):
            return torch.device("cpu")
        if isinstance(node, Format):
            return getattr(torch, node.name)
        if not isinstance(node, View):
            return node
        storage = self._storages[node.storage]
        return torch.empty(0, dtype=node.dtype).set_(storage, node.offset, node.size, node.stride)  # type: ignore

    def play(self, step: Step) -> None:
        """Run one step and bind its results."""
        arguments, options = tree_map(self.take, (step.arguments, step.options))
        if step.name is None:
            results = load_program(step.text, self._configs, self._folder)(arguments)
        elif step.name.startswith("aten._scaled_dot_product_"):
            results = stand_for_attention(step.name)(*arguments, **options)
        else:
            results = _find_operator(step.name)(*arguments, **options)
        for view, value in zip(tree_leaves(step.results), tree_leaves(results), strict=False):
            if isinstance(view, View):
                self.bind(view, value)


def _find_operator(name: str) -> Any:
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found


def play(recording: Recording, configs: Configs) -> dict[str, Tensor]:
    """Return the results of a recording by name, computed on the CPU; configs: tiles that its kernels were given."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        player = _Player(configs, Path(folder))
        for view, value in recording.given.values():
            player.bind(view, value.clone(memory_format=torch.preserve_format))
        for step in recording.steps:
            player.play(step)
        return {name: player.take(view).clone() for name, view in recording.results.items()}
