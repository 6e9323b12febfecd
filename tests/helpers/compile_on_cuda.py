"""Worker: compiles a case of tests/kernels for an H100 that is not there, as a run would; prints what that took.

argv: the case, the file of saved kernels. Prints JSON {"compiled", "loaded", "seconds"}.
"""

import json
import sys
from pathlib import Path

import torch

from launch.simulate.device_kind import KINDS
from launch.simulate.fake_device import pretend
from pretrain.health.compilations import CompilationCounter
from pretrain.run.kernel_cache import KernelCache
from tests.kernels.case import draw_shapes
from tests.kernels.cases import find_case
from tests.kernels.recording import Recorder, record


def main(name: str, path: str) -> None:
    """Compile the case with the saved kernels, if there are any, and save them."""
    pretend(KINDS["h100"])
    cache = KernelCache(Path(path), is_writer=True)
    cache.load()
    counter, case = CompilationCounter(cache), find_case(name)[0]
    drawn = case.draw(draw_shapes(torch.bfloat16))

    def run(recorder: Recorder) -> dict[str, torch.Tensor]:
        return case.run({name: recorder.give(name, value) for name, value in drawn.items()})

    record(run)
    counter.read_step(0)
    counter.read_step(0)  # a step without compilations saves
    counts = counter.counts
    print(
        json.dumps(
            {"compiled": counts.compiled_kernels, "loaded": counts.loaded_kernels, "seconds": counts.compile_seconds}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
