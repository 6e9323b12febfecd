"""Read what torch.compile makes for a device: every triton kernel with its registers, spills and instructions."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.simulate.device_kind import DeviceKind
from launch.simulate.hooks import find_hook, replace_hook

RESERVED_SHARED = 1 << 10  # bytes of shared memory that CUDA takes for itself in every block
REGISTER_UNIT = 8  # a thread gets its registers in eights
AUTOTUNER = "torch._inductor.runtime.triton_heuristics:CachingAutotuner"
TENSOR_CORE = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")


@dataclass(frozen=True)
class Kernel:
    """Holds what ptxas and the PTX say of one kernel; one of inductor's candidates where it would measure several.

    config: its sizes of tiles, where inductor passes them. spill_stores, spill_loads: bytes a thread moves because
    registers do not suffice. shared: bytes per block. blocks: as many fit one multiprocessor. tensor_core: instructions
    that multiply matrices. multiplies: whether its source does.
    """

    name: str
    config: dict[str, Any]
    warps: int
    stages: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    blocks: int
    tensor_core: int
    multiplies: bool
    target: str

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


def count_blocks(kind: DeviceKind, warps: int, registers: int, shared: int) -> int:
    """Return how many blocks of a kernel fit one multiprocessor by registers, shared memory and threads; 0: none."""
    threads = 32 * warps
    by_registers = kind.registers_per_multiprocessor // (
        threads * -(-max(registers, 1) // REGISTER_UNIT) * REGISTER_UNIT
    )
    by_shared = kind.shared_per_multiprocessor // (shared + RESERVED_SHARED) if shared <= kind.shared_per_block else 0
    return min(by_registers, by_shared, kind.threads_per_multiprocessor // threads, kind.blocks_per_multiprocessor)


@contextmanager
def watch_kernels(kind: DeviceKind) -> Iterator[list[Kernel]]:
    """Yield a list that receives every triton kernel compiled in the body; identical ones once."""
    found: list[Kernel] = []

    def precompile(tuner: Any, config: Any) -> Any:
        result = original(tuner, config)
        source = Path(tuner.fn.fn.__code__.co_filename).read_text()  # the kernel and the functions that it calls
        kernel = _read_kernel(kind, tuner.fn.__name__, source, config, result.kernel)
        if kernel not in found:
            found.append(kernel)
        return result

    original = replace_hook(f"{AUTOTUNER}._precompile_config", precompile)
    try:
        yield found
    finally:
        replace_hook(f"{AUTOTUNER}._precompile_config", original)


def _read_kernel(kind: DeviceKind, name: str, source: str, config: Any, binary: Any) -> Kernel:
    ptx = binary.asm["ptx"]
    target = _search(r"\.target (sm_\w+)", ptx)[1]
    report = _assemble(kind, ptx, target)
    spills = _search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers, warps = int(_search(r"Used (\d+) registers", report)[1]), binary.metadata.num_warps
    shared = binary.metadata.shared
    return Kernel(
        name=name,
        config=dict(config.kwargs),
        warps=warps,
        stages=binary.metadata.num_stages,
        registers=registers,
        spill_stores=int(spills[1]),
        spill_loads=int(spills[2]),
        shared=shared,
        blocks=count_blocks(kind, warps, registers, shared),
        tensor_core=sum(ptx.count(instruction) for instruction in TENSOR_CORE),
        multiplies="tl.dot" in source,
        target=target,
    )


def _search(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern!r} in: {text[:2000]}"
    return found


def _assemble(kind: DeviceKind, ptx: str, target: str) -> str:
    """Return what ptxas, from triton's wheel, reports of a kernel."""
    assembler = find_hook("triton.backends.nvidia.compiler:get_ptxas")(kind.architecture).path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [assembler, "-v", f"--gpu-name={target}", str(path), "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas refuses a kernel: {done.stderr[-2000:]}")
    return done.stderr + done.stdout
