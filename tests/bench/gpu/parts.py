"""The benchmark's parts by name. A part that fails leaves its error in its place."""

from collections.abc import Callable
from typing import Any

import torch

from tests.bench.gpu.attention import measure_attention
from tests.bench.gpu.head import measure_head
from tests.bench.gpu.meter import attempt
from tests.bench.gpu.operators import measure_operators
from tests.bench.gpu.saved import measure_saved
from tests.bench.gpu.steps import CONTRIBUTIONS, STEPS, Workbench, measure_fp8, measure_recompute, measure_steps
from tests.bench.joint.sides import OURS
from tests.bench.joint.speed import profile

Part = Callable[[Workbench, int], dict[str, Any]]


def _profile_step(bench: Workbench, length: int) -> dict[str, Any]:
    activities = torch.profiler.ProfilerActivity
    run = bench.build_runs(length, (OURS,))[OURS]
    return profile(run, activities.CUDA if bench.meter.is_cuda else activities.CPU)


def _compare_fp8(bench: Workbench, length: int) -> dict[str, Any]:
    return measure_fp8(bench, length) if bench.settings.fp8 is not None else {}


PARTS: dict[str, Part] = {
    "steps": lambda bench, length: measure_steps(bench, length, STEPS),
    "recompute": measure_recompute,
    "attention": measure_attention,
    "contributions": lambda bench, length: measure_steps(bench, length, CONTRIBUTIONS),
    "head": measure_head,
    "operators": measure_operators,
    "saved": measure_saved,
    "profile": _profile_step,
    "fp8": _compare_fp8,
}
ORDER = tuple(PARTS)


def run_part(bench: Workbench, part: str, length: int) -> dict[str, Any]:
    """Return its results at a length, or {"error"}."""
    results: dict[str, Any] = {}
    error = attempt(bench.meter, lambda: results.update(PARTS[part](bench, length)))
    bench.meter.release()
    return {"error": error} if error is not None else results
