"""Lower and compile cases for a pretended device: `python -m tests.kernels.flash.compile KIND OUTPUT CASE ...`.

For a process in the environment of `processes.py`. Torch lowers FlexAttention to programs that call FlashAttention 4;
these run on fake tensors, on which FlashAttention 4 checks its arguments and compiles its kernels, and launches none.
OUTPUT receives one line of JSON for every case, as soon as it is done: an Outcome of `table.py`.
"""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._inductor.codecache import PyCodeCache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from launch.simulate.device_kind import KINDS, DeviceKind
from launch.simulate.fake_device import pretend
from launch.simulate.hooks import replace_hook
from tests.kernels.case import Tensors, draw_shapes
from tests.kernels.flash.cases import FlashCase, find_case
from tests.kernels.flash.cubin import read_cubin
from tests.kernels.flash.table import Direction, Outcome
from tests.kernels.recording import Recorder, Step, View, record

HARDWARE = "cutlass.utils:HardwareInfo"
# What FlashAttention 4 calls in the programs of torch, by direction.
ENTRIES = {"forward": "_flash_attn_fwd(", "backward": "_flash_attn_bwd("}
LONGEST_REASON = 400


def list_hooks(kind: DeviceKind) -> Mapping[str, Any]:
    """Return what is replaced, in addition to `pretend`, for programs to run on fake tensors, as `module:name.name`."""
    return {
        "torch.cuda:_DeviceGuard": lambda *_: contextlib.nullcontext(),
        "torch.cuda:set_device": lambda *_: None,
        "torch._C._dynamo.guards:_empty_strided_cuda": _make_empty,
        "torch._C._dynamo.guards:copy_if_misaligned": lambda tensor: tensor,
        # Programs' kernels of triton, which make the mask's blocks and sum gradients, are not looked at here.
        "torch._inductor.async_compile:AsyncCompile.triton": lambda *_, **__: SimpleNamespace(run=_do_nothing),
        # Asked of the driver: how many multiprocessors a persistent kernel fills.
        f"{HARDWARE}.__init__": _do_nothing,
        f"{HARDWARE}.get_device_multiprocessor_count": lambda _: kind.num_multiprocessors,
    }


def _make_empty(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


def _do_nothing(*_: Any, **__: Any) -> None:
    pass


def compile_case(case: FlashCase, folder: Path) -> Outcome:
    """Return what becomes of a case; `folder` is where FlashAttention's compiler leaves cubins."""
    started = time.perf_counter()

    def run(recorder: Recorder) -> Tensors:
        return case.run(
            {name: recorder.give(name, value) for name, value in case.draw(draw_shapes(torch.bfloat16)).items()}
        )

    try:
        recording = record(run)
    except Exception as error:
        return Outcome(case.mask, case.blocks, time.perf_counter() - started, describe(error), {})
    seconds = time.perf_counter() - started
    directions = {
        name: _compile_program(step, folder)
        for step in recording.steps
        for name, entry in ENTRIES.items()
        if entry in step.text
    }
    return Outcome(case.mask, case.blocks, seconds, None, directions)


def _compile_program(step: Step, folder: Path) -> Direction:
    """Run one of torch's programs on fake tensors, and read the kernels that were compiled by it."""
    started = time.perf_counter()
    try:
        with FakeTensorMode():
            program: Callable[..., Any] = PyCodeCache.load(step.text).call
            program(tree_map(_make_fake, step.arguments))
        error = None
    except Exception as raised:
        error = describe(raised)
    seconds = time.perf_counter() - started
    cubins = [read_cubin(path) for path in folder.glob("*.cubin")]
    for path in folder.iterdir():
        path.unlink()
    keys_per_call = re.search(r"mask_mod\.__vec_size__ = (\d+)", step.text)
    return Direction(seconds, error, cubins, int(keys_per_call[1]) if keys_per_call else 1)


def _make_fake(node: Any) -> Any:
    if not isinstance(node, View):
        return node
    return torch.empty_strided(node.size, node.stride, dtype=node.dtype, device="cuda")


def describe(error: Exception) -> str:
    """Return kind and message of an error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}"[:LONGEST_REASON]


def main(kind: str, output: str, *names: str) -> None:
    """Compile the named cases."""
    pretend(KINDS[kind])
    for hook, replacement in list_hooks(KINDS[kind]).items():
        replace_hook(hook, replacement)
    folder = Path(os.environ["CUTE_DSL_DUMP_DIR"])
    with Path(output).open("w") as file:
        for name in names:
            file.write(json.dumps(asdict(compile_case(find_case(kind, name), folder))) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
