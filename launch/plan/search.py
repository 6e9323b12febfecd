"""Plan every layout that the rules allow, and rank those that fit by predicted time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from conf.schema import Recompute, RunConfig
from conf.system.errors import ConfigError
from launch.plan.hardware_profile import HardwareProfile
from launch.plan.layout_plan import LayoutPlan, plan_layout
from launch.plan.step_work import TEXT, SequenceKind

LARGEST_CONTEXT, LARGEST_PIPELINE, LARGEST_VIRTUAL = 16, 16, 8


@dataclass(frozen=True)
class Search:
    """Holds the result of search_layouts.

    feasible: fastest first. smallest: the layout that needs least memory, whether it fits or not. tried: how many
    layouts the rules allow. refused: how many they reject. example: the message for one of the rejected.
    """

    feasible: list[LayoutPlan]
    smallest: LayoutPlan | None
    tried: int
    refused: int
    example: str


def search_layouts(config: RunConfig, num_gpus: int, hardware: HardwareProfile, kind: SequenceKind = TEXT) -> Search:
    """Search tensor, context, pipeline and virtual pipeline degrees, micro batch and recomputation.

    Everything else is as in `config`. Tensor-parallel groups stay within a node and use sequence parallelism. Context
    parallelism is tried with a micro batch of 1 only, because smaller micro batches are the cheaper way to save memory.
    Layouts of equal time are ranked by memory.
    """
    plans, refusals = [], []
    for candidate in _candidates(config, num_gpus, hardware):
        try:
            plans.append(plan_layout(candidate, num_gpus, hardware, kind))
        except ConfigError as error:
            refusals.append(str(error))
    plans.sort(key=lambda plan: (plan.time.total, plan.fullest.total))
    smallest = min(plans, key=lambda plan: plan.fullest.total, default=None)
    feasible = [plan for plan in plans if plan.fits]
    return Search(feasible, smallest, len(plans), len(refusals), min(refusals, key=len, default=""))


def _candidates(config: RunConfig, num_gpus: int, hardware: HardwareProfile) -> Iterator[RunConfig]:
    layers, batch = config.model.num_layers, config.train.global_batch_size
    tensor = _powers_of_two(min(hardware.gpus_per_node, num_gpus))
    pipeline = _divisors(layers, min(LARGEST_PIPELINE, num_gpus))
    context = _powers_of_two(min(LARGEST_CONTEXT, num_gpus))
    for tp, cp, pp, micro, recompute in product(tensor, context, pipeline, _divisors(batch, batch), Recompute):
        if num_gpus % (tp * cp * pp) or (cp > 1 and micro > 1):
            continue
        for virtual in _divisors(layers // pp, LARGEST_VIRTUAL) if pp > 1 else (1,):
            parallel = replace(
                config.parallel,
                tensor_parallel=tp,
                context_parallel=cp,
                pipeline_parallel=pp,
                virtual_pipeline_parallel=virtual,
                sequence_parallel=tp > 1,
                recompute=recompute,
            )
            yield replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=micro))


def _divisors(value: int, largest: int) -> list[int]:
    return [number for number in range(1, min(value, largest) + 1) if value % number == 0]


def _powers_of_two(largest: int) -> list[int]:
    return [2**power for power in range(largest.bit_length())]
