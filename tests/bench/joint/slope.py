"""How memory grows with the sequence: the step under full recomputation against launch.plan, and the head alone."""

from typing import Any

from conf.schema import Objective, ParallelConfig, Recompute
from launch.plan.memory import estimate_memory
from launch.plan.rank_shape import CPU_KERNELS, FP32, RankShape
from tests.bench.joint.cases import BLOCK_SIZE, Case, build_input
from tests.bench.joint.memory import measure_memory
from tests.bench.joint.parts import build_parts
from tests.bench.joint.sides import OURS, build_side
from tests.helpers.live_bytes import LiveBytes


def measure_slope(vocab_size: int, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Measure and predict bytes per clean token between the shortest and the longest sequence, with all points."""
    cases = [Case(length, vocab_size) for length in lengths]
    measured = [measure_memory(case, OURS, recompute=True)["live"] for case in cases]
    predicted = [predict_transient(case) for case in cases]
    tokens = lengths[-1] - lengths[0]
    return {
        "lengths": lengths,
        "bytes": measured,
        "predicted_bytes": predicted,
        "bytes_per_token": (measured[-1] - measured[0]) / tokens,
        "predicted_bytes_per_token": (predicted[-1] - predicted[0]) / tokens,
        "head_bytes": [measure_head(case) for case in cases],
        "whole_logits_bytes": [FP32 * 2 * length * vocab_size for length in lengths],
    }


def predict_transient(case: Case) -> int:
    """Return launch.plan's most bytes of activations, logits and working memory at a time."""
    counts = build_input(case, Objective.joint).counts
    shape = RankShape(
        model=case.model,
        parallel=ParallelConfig(recompute=Recompute.full),
        kernels=CPU_KERNELS,
        element_bytes=FP32,
        data_parallel=1,
        num_microbatches=1,
        micro_batch_size=1,
        sequence_length=case.sequence_length,
        block_size=BLOCK_SIZE,
        noisy_length=case.sequence_length,
        num_scored_positions=counts.clean + counts.masked,
        scored_chunk_size=case.runtime.loss_chunk_rows,
    )
    (stage,) = estimate_memory(shape)
    return stage.transient


def measure_head(case: Case) -> int:
    """Return the most live bytes in the head's forward and backward, its input not counted."""
    side = build_side(case, OURS)
    head = build_parts(side)["head"]
    head()
    with LiveBytes([*side.module.parameters(), *side.gradients().values()]) as live:
        head()
    return live.peak
