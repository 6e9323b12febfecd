"""Worker: compiles a function for four forms of its inputs, and notes what that took per rank.

argv: a folder for the notes, `compiled_rank<r>.json` = {"compiled", "loaded", "seconds"}; the kernel cache's folder;
the function: rotation (rotate_heads, for which inductor writes C++), or matmul, which needs no C++ compiler.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def main() -> None:
    """Compile on every rank as a training would, with the cache that a run would open."""
    import torch

    from conf.schema import Device
    from pretrain.health.compilations import CompilationCounter
    from pretrain.run.kernel_cache import open_kernel_cache
    from pretrain.run.process_group import join_process_group

    notes, folder, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    function, forms = FUNCTIONS[name]()
    with join_process_group(Device.cpu, timeout_minutes=5) as ranks:
        counter = CompilationCounter(open_kernel_cache(folder, ranks))
        compiled = torch.compile(function, dynamic=False)
        for inputs in forms:
            torch.testing.assert_close(compiled(*inputs), function(*inputs))
            counter.read_step(0)
            counter.read_step(0)  # a step without compilations saves
        counts = counter.counts
        note = {"compiled": counts.compiled_kernels, "loaded": counts.loaded_kernels, "seconds": counts.compile_seconds}
        (notes / f"compiled_rank{ranks.rank}.json").write_text(json.dumps(note), encoding="utf-8")


def _rotation() -> tuple[Callable[..., Any], Iterator[tuple[Any, ...]]]:
    import torch

    from model.attention.rotation import rotate_heads

    x, angles, scale = torch.randn(64, 1, 4, 32), torch.randn(64, 1, 1, 32), torch.rand(64, 1, 1, 1)
    return rotate_heads, ((x, angles, angles, factor, way) for factor in (None, scale) for way in (True, False))


def _matmul() -> tuple[Callable[..., Any], Iterator[tuple[Any, ...]]]:
    import torch

    def multiply(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ y

    return multiply, ((torch.randn(size, 8), torch.randn(8, 8)) for size in (4, 5, 6, 7))


FUNCTIONS = {"rotation": _rotation, "matmul": _matmul}


if __name__ == "__main__":
    main()
