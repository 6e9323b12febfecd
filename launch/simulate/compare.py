"""Compare what a rank did with what launch.plan predicts for its pipeline stage."""

from collections import Counter
from dataclasses import dataclass, replace
from statistics import mean

from conf.schema import RunConfig
from launch.plan.communication import estimate_pipeline_stage_traffic
from launch.plan.memory import estimate_memory
from launch.plan.rank_shape import PLAIN_GPU_KERNELS, build_rank_shape
from launch.plan.step_time import count_recomputed_flops
from launch.simulate.collectives import Collective
from launch.simulate.rank_report import RankReport, Recording
from pretrain.costs import count_step_flops

# Positions beyond which the last layer continues with all (model/megatron/tri_mode.py; it imports megatron-core).
MAX_LAST_SHARE = 0.9
# Smaller messages (counts, losses, norms, the head's maxima and sums of a chunk) are not planned.
SMALL_MESSAGE = 64 << 10


@dataclass(frozen=True)
class Compared:
    """Holds one figure of a rank, simulated and planned. unit: bytes, FLOPs or times."""

    name: str
    simulated: float
    planned: float
    unit: str

    @property
    def difference(self) -> float:
        """Planned relative to simulated, less one; infinite where only one of them is zero."""
        if self.simulated == self.planned:
            return 0.0
        return self.planned / self.simulated - 1 if self.simulated else float("inf")


def compare(config: RunConfig, report: RankReport) -> list[Compared]:
    """Return peak memory, FLOPs, and times and bytes of each kind of collective. config: of what was simulated."""
    assert report.step is not None, "the rank was simulated"
    step, num_gpus, pp_rank = report.step, len(report.groups["world"]), report.place["pipeline"]
    # There is no Transformer Engine on fake tensors.
    shape = build_rank_shape(config, num_gpus, PLAIN_GPU_KERNELS)
    lengths = report.noisy_lengths or [0]
    memory = estimate_memory(replace(shape, noisy_length=max(lengths)))[pp_rank]
    figures = [
        Compared("peak memory", step.peak, memory.total, "bytes"),
        *(Compared(kind, step.kinds.get(kind, 0), getattr(memory, kind), "bytes") for kind in ("weights", "gradients")),
        Compared("optimizer", step.kinds.get("optimizer", 0), memory.optimizer, "bytes"),
        Compared("FLOPs", sum(step.flops.values()), plan_flops(config, report), "FLOPs"),
    ]
    planned: dict[tuple[str, str], tuple[int, int]] = {}
    # The plan counts with every position scored; messages of the head hold those that are.
    scored = round(report.scored_positions / (shape.num_microbatches * config.parallel.context_parallel))
    sent = replace(shape, num_scored_positions=scored, noisy_length=round(mean(lengths)))
    for item in estimate_pipeline_stage_traffic(sent, pp_rank):
        count, num_bytes = planned.get((item.group, item.operation), (0, 0))
        planned[item.group, item.operation] = count + item.count, num_bytes + item.num_bytes
    simulated = sum_collectives(step, report.groups)
    for key in sorted(planned.keys() | simulated.keys()):
        (count, num_bytes), (planned_count, planned_bytes) = simulated.get(key, (0, 0)), planned.get(key, (0, 0))
        figures.append(Compared(f"{key[0]} {key[1]}", count, planned_count, "times"))
        figures.append(Compared(f"{key[0]} {key[1]}", num_bytes, planned_bytes, "bytes"))
    return figures


def plan_flops(config: RunConfig, report: RankReport) -> float:
    """Return the planned FLOPs of the rank's own microbatches, recomputation included.

    Of context-parallel ranks each gets the mean of their attended pairs.
    """
    parallel = config.parallel
    flops = count_step_flops(config.model, report.positions, report.attended_pairs, report.scored_positions)
    is_last = report.place["pipeline"] == parallel.pipeline_parallel - 1
    layers = flops.layers + flops.attention + count_recomputed_flops(parallel.recompute, flops)
    of_stage = layers / parallel.pipeline_parallel + (
        flops.head - _count_narrowed_flops(config, report) if is_last else 0
    )
    return of_stage / (parallel.tensor_parallel * parallel.context_parallel)


def _count_narrowed_flops(config: RunConfig, report: RankReport) -> int:
    """Return what the last layer leaves out: it continues with scored positions alone (model/megatron/tri_mode.py)."""
    model, positions = config.model, report.positions
    if config.parallel.sequence_parallel or report.scored_positions > MAX_LAST_SHARE * positions:
        return 0
    weights = model.query_width * model.hidden_size + 3 * model.ffn_hidden_size * model.hidden_size
    return 3 * 2 * (positions - report.scored_positions) * weights


def sum_collectives(recording: Recording, groups: dict[str, list[int]]) -> dict[tuple[str, str], tuple[int, int]]:
    """Return how often and how many bytes a rank sent, by (group, operation), small messages left out."""
    times, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for item in recording.collectives:
        if item.num_bytes >= SMALL_MESSAGE and item.operation != "receive":
            key = name_group(item, groups), item.operation
            times[key] += 1
            sizes[key] += item.num_bytes
    return {key: (times[key], sizes[key]) for key in times}


def name_group(item: Collective, groups: dict[str, list[int]]) -> str:
    """Return the kind of group in which a collective happened; groups of the same ranks go by the last name."""
    if item.operation in ("send", "receive"):
        return "pipeline"
    names = [name for name, ranks in groups.items() if tuple(ranks) == item.ranks]
    return names[-1] if names else f"ranks {item.ranks[0]} to {item.ranks[-1]}"
