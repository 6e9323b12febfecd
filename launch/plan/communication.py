"""Estimate the bytes a GPU sends per optimizer step, by group and collective.

Rings: of n bytes over g ranks, an all-gather or reduce-scatter sends n (g - 1) / g per rank, an all-reduce twice that.
"""

from dataclasses import dataclass

from conf.schema import Recompute
from launch.plan.memory import count_pipeline_stage_parameters
from launch.plan.rank_shape import FP32, RankShape

# Consecutive ranks are tensor, then context, then data, then pipeline parallel (megatron-core's order).


@dataclass(frozen=True)
class Traffic:
    """Describes the collectives of one kind in one group.

    group: tensor, context, pipeline or data (which includes context). size: ranks of the group. span: consecutive ranks
    that contain it. count: per step, of the pipeline stage with most of them. message_bytes: the whole of each.
    """

    group: str
    operation: str
    size: int
    span: int
    count: int
    message_bytes: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that one GPU sends per step in all `count` collectives."""
        if self.operation == "send":
            return self.count * self.message_bytes
        share = (self.size - 1) / self.size
        return self.count * self.message_bytes * share * (2 if self.operation == "all-reduce" else 1)


def estimate_traffic(shape: RankShape) -> list[Traffic]:
    """Estimate what is sent in groups of more than one rank. Scalars, gradients of norms and counts are left out."""
    parallel = shape.parallel
    traffic = []
    if parallel.tensor_parallel > 1:
        traffic += _tensor_traffic(shape)
    if parallel.context_parallel > 1:
        traffic += _context_traffic(shape)
    if parallel.pipeline_parallel > 1:
        traffic += _pipeline_traffic(shape)
    if shape.data_ranks > 1:
        traffic += _data_traffic(shape)
    return traffic


def _tensor_traffic(shape: RankShape) -> list[Traffic]:
    """Count an all-reduce at the end of attention and MLP in the forward, and one at their beginning in the backward.

    With sequence parallelism these are reduce-scatters and all-gathers, and the backward gathers the input of each
    once more for the gradient of its weights.
    """
    parallel = shape.parallel
    layers = shape.model.num_layers // parallel.pipeline_parallel
    recomputed = 1 if parallel.recompute is Recompute.full else 0
    whole = shape.num_positions * shape.model.hidden_size * shape.element_bytes
    scored = shape.num_scored_positions * shape.model.hidden_size * shape.element_bytes
    # The embedding of the first pipeline stage and the head of the last one are counted as if on the same stage.
    if parallel.sequence_parallel:
        kinds = [
            ("all-gather", layers * (6 + 2 * recomputed) + 2, whole),
            ("reduce-scatter", layers * (4 + 2 * recomputed) + 1, whole),
        ]
    else:
        kinds = [("all-reduce", layers * (4 + 2 * recomputed) + 1, whole)]
    kinds.append(("all-reduce", 1, scored))
    size = parallel.tensor_parallel
    return [Traffic("tensor", name, size, size, shape.num_microbatches * count, part) for name, count, part in kinds]


def _context_traffic(shape: RankShape) -> list[Traffic]:
    """Count the all-gather of a layer's clean keys and values, and the reduce-scatter of their gradients.

    AR and joint stage send the same, because noisy keys stay on their rank. Recomputed attention gathers again.
    """
    parallel = shape.parallel
    layers = shape.model.num_layers // parallel.pipeline_parallel
    recomputed = 1 if parallel.recompute in (Recompute.selective, Recompute.full) else 0
    size, span = parallel.context_parallel, parallel.tensor_parallel * parallel.context_parallel
    count, message = shape.num_microbatches * layers, clean_keys_bytes(shape)
    return [
        Traffic("context", "all-gather", size, span, count * (1 + recomputed), message),
        Traffic("context", "reduce-scatter", size, span, count, message),
    ]


def clean_keys_bytes(shape: RankShape) -> int:
    """Return the bytes of a layer's clean keys and values: one microbatch, whole sequences, a tensor-parallel rank."""
    width = 2 * shape.model.key_value_width // shape.parallel.tensor_parallel
    return shape.micro_batch_size * shape.sequence_length * width * shape.element_bytes


def _pipeline_traffic(shape: RankShape) -> list[Traffic]:
    """Count hidden states sent to the next pipeline stage and gradients sent back, for every model chunk."""
    parallel = shape.parallel
    virtual = parallel.virtual_pipeline_parallel
    span = parallel.tensor_parallel * shape.data_ranks * 2
    # Each of two stages is an end: the last chunk sends no hidden states, the first one no gradients.
    count = shape.num_microbatches * (2 * virtual - (1 if parallel.pipeline_parallel == 2 else 0))
    return [Traffic("pipeline", "send", 2, span, count, shape.stream_bytes)]


def _data_traffic(shape: RankShape) -> list[Traffic]:
    """Count the reduce-scatter of fp32 gradients and the all-gather of updated weights."""
    num_stages = shape.parallel.pipeline_parallel
    parameters = max(count_pipeline_stage_parameters(shape, pp_rank) for pp_rank in range(num_stages))
    size, span = shape.data_ranks, shape.parallel.tensor_parallel * shape.data_ranks
    return [
        Traffic("data", "reduce-scatter", size, span, 1, parameters * FP32),
        Traffic("data", "all-gather", size, span, 1, parameters * shape.element_bytes),
    ]
