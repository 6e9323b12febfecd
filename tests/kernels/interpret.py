"""Interpret what lower.py recorded: `python -m tests.kernels.interpret INPUT OUTPUT`.

OUTPUT, as JSON, has by case the relative errors of all results against float64, and the seconds.
"""

import json
import sys
import time
from math import prod
from pathlib import Path
from typing import Any

from tests.kernels.interpreting import play, prepare  # isort: skip  # before triton is imported elsewhere

import torch
from torch import Tensor

from tests.kernels.case import Case
from tests.kernels.cases import find_case
from tests.kernels.compiled import Kernel
from tests.kernels.recording import Recording


def compare(case: Case, recording: Recording, kernels: list[Kernel]) -> dict[str, float]:
    """Return by result the relative error of a played recording: norm of the difference over norm of the reference."""
    # Of inductor's candidates the largest tiles, which are the fewest.
    configs = {
        kernel.name: kernel.config for kernel in sorted(kernels, key=lambda kernel: prod(kernel.config.values()))
    }
    results = play(recording, configs)
    given = {name: value.double() for name, (_, value) in recording.given.items()}
    for name, value in case.draw(lambda *size: torch.empty(size, device="meta")).items():
        given[name].requires_grad_(value.requires_grad)
    expected = case.compute_reference(given)
    assert results.keys() == expected.keys()
    return {name: _compute_error(results[name], expected[name].detach()) for name in expected}


def _compute_error(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape
    return float((result.double() - expected).norm() / expected.norm())


def main(source: str, output: str) -> None:
    """Interpret every case of the file that was recorded."""
    prepare()
    lowered: dict[str, dict[str, Any]] = torch.load(source, weights_only=False)
    errors: dict[str, dict[str, Any]] = {}
    for name, case in lowered.items():
        if case["recording"] is not None:
            started = time.perf_counter()
            found = compare(find_case(name)[0], case["recording"], case["kernels"])
            errors[name] = {"errors": found, "seconds": time.perf_counter() - started}
        Path(output).write_text(json.dumps(errors))


if __name__ == "__main__":
    main(*sys.argv[1:])
