"""Compile cases for a pretended device: `python -m tests.kernels.lower KIND OUTPUT CASE ...`.

For a process in a fake_cuda_environment. OUTPUT receives, by case, its kernels and recording, or an error.
"""

import sys
import time
import traceback
from typing import Any

import torch

from launch.simulate.device_kind import KINDS, DeviceKind
from launch.simulate.fake_device import pretend
from launch.simulate.hooks import MissingHookError
from tests.kernels.case import Case, Tensors, draw_shapes, draw_values
from tests.kernels.cases import find_case
from tests.kernels.compiled import watch_kernels
from tests.kernels.recording import Recorder, record


def lower(kind: DeviceKind, case: Case, is_interpreted: bool) -> dict[str, Any]:
    """Return the kernels of a case, and with float16 values what it does with them; "error" where it fails."""
    started = time.perf_counter()
    draw = draw_values(torch.float16) if is_interpreted else draw_shapes(torch.bfloat16)

    def run(recorder: Recorder) -> Tensors:
        return case.run({name: recorder.give(name, value) for name, value in case.draw(draw).items()})

    with watch_kernels(kind) as kernels:
        try:
            recording, error = record(run), None
        except MissingHookError:  # of no case in particular
            raise
        except Exception:
            recording, error = None, traceback.format_exc()
    return {
        "kernels": kernels,
        "recording": recording if is_interpreted else None,
        "error": error,
        "seconds": time.perf_counter() - started,
    }


def main(kind: str, output: str, *names: str) -> None:
    """Lower the named cases."""
    pretend(KINDS[kind])
    outcomes = {}
    for name in names:
        outcomes[name] = lower(KINDS[kind], *find_case(name))
        torch.save(outcomes, output)  # after each: minutes of work


if __name__ == "__main__":
    main(*sys.argv[1:])
