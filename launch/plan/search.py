"""All layouts that the rules allow, planned; those that fit, fastest first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from conf.schema import Recompute, RunConfig
from conf.system.errors import ConfigError
from launch.plan.hardware import Hardware
from launch.plan.plan import Plan, build_plan

LARGEST_CONTEXT, LARGEST_PIPELINE, LARGEST_VIRTUAL = 16, 16, 8


@dataclass(frozen=True)
class Search:
    """Result of search_layouts.

    feasible: fastest first. smallest: the layout that needs least memory, whether it fits or not. tried: layouts that
    the rules allow. refused: how many they do not allow. example: what a rule says to one of these.
    """

    feasible: list[Plan]
    smallest: Plan | None
    tried: int
    refused: int
    example: str


def search_layouts(config: RunConfig, num_gpus: int, hardware: Hardware, document_tokens: int | None = None) -> Search:
    """Tensor, context, pipeline and virtual pipeline degrees, micro batch and recomputation; the rest is `config`'s.

    Tensor-parallel groups stay within a node and split the sequence too. Sequences are split over context-parallel
    ranks where each comes alone: smaller micro batches are the cheaper way to less memory. Equal times go to less.
    """
    plans, refusals = [], []
    for candidate in _candidates(config, num_gpus, hardware):
        try:
            plans.append(build_plan(candidate, num_gpus, hardware, document_tokens))
        except ConfigError as error:
            refusals.append(str(error))
    plans.sort(key=lambda plan: (plan.time.total, plan.worst.total))
    smallest = min(plans, key=lambda plan: plan.worst.total, default=None)
    feasible = [plan for plan in plans if plan.fits]
    return Search(feasible, smallest, len(plans), len(refusals), min(refusals, key=len, default=""))


def _candidates(config: RunConfig, num_gpus: int, hardware: Hardware) -> Iterator[RunConfig]:
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
