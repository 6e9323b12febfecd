"""Time of the joint step against the straightforward formulation, the bare matmuls, and our AR step."""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from pretrain.costs import count_step_flops
from tests.bench.joint.cases import Case
from tests.bench.joint.economies import count_economies
from tests.bench.joint.floor import build_matmuls, count_reference_work, count_useful_work
from tests.bench.joint.parts import build_parts
from tests.bench.joint.sides import AR, OURS, REFERENCE, Side, build_side
from tests.bench.joint.workers import Build, measure_in_processes
from tests.bench.timing import measure_in_turns, ratio, spread

BARE = "bare matmuls"
TOLERANCE = 1e-5  # of losses (relative), and of gradients (of each weight's largest)


def measure_speed(case: Case, rounds: int) -> dict[str, Any]:
    """Return ratios of medians, with the times in seconds and their spread.

    Raises AssertionError where results differ.

    share_of_floor is that of a floor in which all positions go through all of every layer. Ours leaves out the last
    layer's positions without loss; share_of_needed counts the floor without them.
    """
    difference = assert_same_results(build_side(case, REFERENCE), build_side(case, OURS))
    builds: dict[str, Build] = {name: partial(_build_step, case, name) for name in (REFERENCE, OURS)}
    times = measure_in_processes(builds | {BARE: partial(_build_bare, case)}, rounds)
    bare = times[BARE]
    work, all_work = count_useful_work(case), count_reference_work(case)
    flops = [
        sum(count_step_flops(case.model, item.num_positions, item.attended_pairs, item.scored_positions))
        for item in (work, all_work)
    ]
    left_out = count_economies(case)["last_layer_positions"]
    return {
        "speedup": ratio(times[REFERENCE], times[OURS]),
        "speedup_allowed_by_floor": ratio(times[REFERENCE], bare),
        "share_of_floor": ratio(bare, times[OURS]),
        "share_of_needed": (1 - left_out) * ratio(bare, times[OURS]),
        "reference_flops_over_useful": flops[1] / flops[0],
        "gflops_of_bare_matmuls": flops[0] / median(bare) / 1e9,
        "seconds": {name: median(values) for name, values in times.items()},
        "spread": {name: spread(values) for name, values in times.items()},
        "largest_difference": difference,
        "rounds": rounds,
    }


def _build_step(case: Case, name: str) -> Callable[[], object]:
    return build_side(case, name).run


def _build_bare(case: Case) -> Callable[[], object]:
    matmuls = build_matmuls(case.model, count_useful_work(case))
    return lambda: [matmul() for matmul in matmuls]


def assert_same_results(reference: Side, ours: Side) -> float:
    """Assert equal losses and gradients; return the largest difference found."""
    sums = []
    for side in (reference, ours):
        side.clear()
        sums.append(side.run())
    differences = [((sums[0] - sums[1]) / sums[0]).abs().max().float()]
    gradients = ours.gradients()
    for name, expected in reference.gradients().items():
        differences.append((gradients[name] - expected).abs().max() / expected.abs().max())
    largest = float(torch.stack(differences).max())  # torch's maximum keeps NaN
    assert largest < TOLERANCE, f"the two formulations differ by {largest}"
    return largest


def measure_parts(case: Case, rounds: int) -> dict[str, Any]:
    """Compare our joint step with our AR step of the same tokens, layers and head apart."""
    joint, ar = build_parts(build_side(case, OURS)), build_parts(build_side(case, AR))
    names = [("joint", joint), ("ar", ar)]
    times = measure_in_turns({f"{side} {part}": f for side, parts in names for part, f in parts.items()}, rounds)
    return {
        "layers_over_ar": ratio(times["joint layers"], times["ar layers"]),
        "head_over_ar": ratio(times["joint head"], times["ar head"]),
        "seconds": {name: median(values) for name, values in times.items()},
        "spread": {name: spread(values) for name, values in times.items()},
    }


def measure_profile(case: Case) -> dict[str, float]:
    """Return the share of our joint step's CPU time by operator, the most expensive first."""
    return profile(build_side(case, OURS).run, torch.profiler.ProfilerActivity.CPU)


def profile(run: Callable[[], object], activity: torch.profiler.ProfilerActivity, most: int = 12) -> dict[str, float]:
    """Return the share of the time of `run` by operator (on the CPU) or kernel (on CUDA), the most expensive first."""
    run()
    with torch.profiler.profile(activities=[activity]) as recorded:
        run()
        if activity is torch.profiler.ProfilerActivity.CUDA:
            torch.cuda.synchronize()
    on_cpu = activity is torch.profiler.ProfilerActivity.CPU
    times = {e.key: e.self_cpu_time_total if on_cpu else e.self_device_time_total for e in recorded.key_averages()}
    total = sum(times.values())
    return {key: times[key] / total for key in sorted(times, key=times.__getitem__, reverse=True)[:most]}
