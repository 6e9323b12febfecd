"""Whole steps, forward and backward, in turns: our AR and joint step, the recipe, and the changes between them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from conf.schema import Objective, PrecisionConfig, Recompute
from model.attention.plan import AttentionPlan
from model.megatron.head import ScoredPositions
from pretrain.costs import count_step_flops, find_peak_flops
from pretrain.objective.scoring import StepCounts
from tests.bench.gpu.meter import Meter, attempt, measure
from tests.bench.gpu.recipe import Recipe, list_changes
from tests.bench.gpu.settings import Settings
from tests.bench.joint.cases import build_input, build_step
from tests.bench.joint.sides import AR, OURS, Side, build_side

RECIPE = "recipe"
STEPS = (AR, OURS, RECIPE)
NARROWED = "ours, last layer narrowed"
CONTRIBUTIONS = (*list_changes(), OURS, NARROWED)
FP8 = "ours, fp8"
AGAIN = "ours, recompute elementwise"


@dataclass(frozen=True)
class Workbench:
    """What every step uses: the settings, the meter, and `side`, our model with its weights and gradient buffers."""

    settings: Settings
    meter: Meter
    side: Side

    def build_runs(self, length: int, names: tuple[str, ...]) -> dict[str, Callable[[], Tensor]]:
        """Return steps by name, each returning its loss; built when first called, so that a failure is its own."""
        return {name: _Late(self.side, lambda name=name: self._build_run(length, name)) for name in names}

    def build_side(self, length: int, objective: Objective = Objective.joint) -> Side:
        """Return our model with a step of so many tokens."""
        return replace(self.side, step=build_step(self.settings.case(length), objective))

    def _build_run(self, length: int, name: str) -> Callable[[], Tensor]:
        side = self.build_side(length, Objective.ar if name == AR else Objective.joint)
        if name in (AR, OURS):
            return lambda: side.run()[0]
        if name == NARROWED:
            return lambda: _run_narrowed(side)
        return Recipe(side, self.settings.case(length), list_changes()[name]).run

    def known(self) -> list[Tensor]:
        """List the tensors that exist between steps."""
        return [*self.side.module.parameters(), *self.side.gradients().values()]


class _Late:
    """A step that is built when it is first run; all steps share the weights and gradient buffers of `side`."""

    def __init__(self, side: Side, build: Callable[[], Callable[[], Tensor]]) -> None:
        self.side, self.build, self.run = side, build, None

    def __call__(self) -> Tensor:
        for weight in self.side.module.parameters():
            weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]  # what the step before said of it
        self.run = self.run or self.build()
        return self.run()


def build_workbench(
    settings: Settings, precision: PrecisionConfig | None = None, recompute: Recompute = Recompute.none
) -> Workbench:
    """Build it inside trainer_session.

    All positions go through all of the last layer: the slice stands for one of a deep model, and for a tensor-parallel
    rank, whose sequence parallelism does not let the last layer narrow.
    """
    case = settings.case(settings.lengths[0], precision, recompute)
    side = build_side(case, OURS)
    side.module.narrow = _keep_all  # type: ignore[method-assign]
    return Workbench(settings, Meter(case.device), side)


def _keep_all(plan: AttentionPlan, scored: ScoredPositions, num_positions: int) -> AttentionPlan:
    return plan


def _run_narrowed(side: Side) -> Tensor:
    """Run the step with the model's own last layer (model/megatron/tri_mode.py)."""
    module: Any = side.module
    del module.narrow
    try:
        return side.run()[0]
    finally:
        module.narrow = _keep_all


def measure_steps(bench: Workbench, length: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Return by name the results of measure with "tokens_per_second" and "mfu".

    Joint steps also have "difference", from the recipe.
    """
    runs = bench.build_runs(length, names)
    results = measure(bench.meter, runs, bench.settings.rounds, bench.known())
    alive = {name: run for name, run in runs.items() if "error" not in results[name]}
    for name in alive:
        results[name] |= compute_rates(bench.settings, length, name, results[name]["seconds"])
    for name, difference in compare_results(bench, alive).items():
        results[name]["difference"] = difference
    return results


def compute_rates(settings: Settings, length: int, name: str, seconds: float) -> dict[str, float | None]:
    """Compute rates of useful work alone; mfu is against the device's bf16 peak, None where that is not known."""
    case = settings.case(length)
    counts: StepCounts = build_input(case, Objective.ar if name == AR else Objective.joint).counts
    flops = sum(count_step_flops(case.model, counts.positions, counts.attended_pairs, counts.clean + counts.masked))
    peak = find_peak_flops(case.device) if name != NARROWED else None  # which leaves out some of these FLOPs
    return {"tokens_per_second": length / seconds, "mfu": flops / seconds / peak if peak else None}


def compare_results(bench: Workbench, runs: dict[str, Callable[[], Tensor]]) -> dict[str, float | str]:
    """Compare every joint step with the recipe: the largest relative difference of the loss and of any gradient's norm.

    A message where comparing fails. Nothing where the recipe itself failed.
    """
    if RECIPE not in runs:
        return {}
    expected: list[Tensor] = []
    found: dict[str, float | str] = {}
    for name, run in {RECIPE: runs[RECIPE], **runs}.items():
        if name == AR:
            continue

        def compare(name: str = name, run: Callable[[], Tensor] = run) -> None:
            results = _collect(bench.side, run)
            if name == RECIPE:
                expected[:] = results
            found[name] = _largest_difference(results, expected)

        error = attempt(bench.meter, compare)
        if error is not None:
            found[name] = error
    return found


def _collect(side: Side, run: Callable[[], Tensor]) -> list[Tensor]:
    """Return loss and gradients, the latter as copies."""
    side.clear()
    loss = run()
    return [loss.double(), *(grad.clone() for grad in side.gradients().values())]


def _largest_difference(results: list[Tensor], expected: list[Tensor]) -> float:
    matched = zip(results, expected, strict=True)
    return float(torch.stack([((mine - its).norm() / its.norm()).float() for mine, its in matched]).max())


def measure_recompute(bench: Workbench, length: int) -> dict[str, Any]:
    """Measure our joint step that recomputes norms and SwiGLU, in turns with ours that does not and the recipe.

    Returns the results of measure with "tokens_per_second"; the one that recomputes has "difference", from ours.
    """
    other = build_workbench(bench.settings, recompute=Recompute.elementwise)
    runs = bench.build_runs(length, (OURS, RECIPE)) | {AGAIN: other.build_runs(length, (OURS,))[OURS]}
    results = measure(bench.meter, runs, bench.settings.rounds, [*bench.known(), *other.known()])
    for name, result in results.items():
        if "error" not in result:
            result |= compute_rates(bench.settings, length, name, result["seconds"])
    if not any("error" in results[name] for name in (OURS, AGAIN)):
        found = (_collect(other.side, runs[AGAIN]), _collect(bench.side, runs[OURS]))
        results[AGAIN]["difference"] = _largest_difference(*found)
    return results


def measure_fp8(bench: Workbench, length: int) -> dict[str, Any]:
    """Measure our joint step in fp8 in turns with the same in the bench's precision."""
    assert bench.settings.fp8 is not None
    other = build_workbench(bench.settings, bench.settings.fp8)
    runs = bench.build_runs(length, (OURS,)) | {FP8: other.build_runs(length, (OURS,))[OURS]}
    results = measure(bench.meter, runs, bench.settings.rounds, [*bench.known(), *other.known()])
    for name, result in results.items():
        if "error" not in result:
            result |= compute_rates(bench.settings, length, name, result["seconds"])
    return results
