"""Bytes a GPU sends per optimizer step, by group and collective.

Rings: of n bytes over g ranks, an all-gather or reduce-scatter sends n (g - 1) / g per rank, an all-reduce twice that.
"""

from dataclasses import dataclass

from conf.schema import Recompute
from launch.plan.memory import count_stage_parameters
from launch.plan.shape import FP32, Shape

# Consecutive ranks are tensor, then context, then data, then pipeline parallel (megatron-core's order).


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one group.

    group: tensor, context, pipeline or data (which includes context). size: its ranks. span: consecutive ranks that
    hold them. count: per step, of the pipeline stage with most of them. message_bytes: of each, whole. sent_bytes: by
    one GPU per step.
    """

    group: str
    operation: str
    size: int
    span: int
    count: int
    message_bytes: int

    @property
    def sent_bytes(self) -> float:
        """Of all `count` together."""
        if self.operation == "send":
            return self.count * self.message_bytes
        share = (self.size - 1) / self.size
        return self.count * self.message_bytes * share * (2 if self.operation == "all-reduce" else 1)


def estimate_traffic(shape: Shape) -> list[Traffic]:
    """What is sent in groups of more than one rank. Scalars, norms' gradients and counts are left out."""
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


def _tensor_traffic(shape: Shape) -> list[Traffic]:
    """Two blocks per layer (attention, MLP) end in a sum over the ranks; each begins with one in the backward.

    With sequence parallelism sums are reduce-scatters and beginnings all-gathers, and the backward gathers each
    block's input once more for the gradient of its weights.
    """
    parallel = shape.parallel
    layers = shape.model.num_layers // parallel.pipeline_parallel
    again = 1 if parallel.recompute is Recompute.full else 0
    whole = shape.rows * shape.model.hidden_size * shape.element_bytes
    scored = shape.scored_rows * shape.model.hidden_size * shape.element_bytes
    # The first stage's embedding and the last one's head are counted on one stage, as if there were only that one.
    if parallel.sequence_parallel:
        kinds = [
            ("all-gather", layers * (6 + 2 * again) + 2, whole),
            ("reduce-scatter", layers * (4 + 2 * again) + 1, whole),
        ]
    else:
        kinds = [("all-reduce", layers * (4 + 2 * again) + 1, whole)]
    kinds.append(("all-reduce", 1, scored))
    size = parallel.tensor_parallel
    return [Traffic("tensor", name, size, size, shape.num_microbatches * count, part) for name, count, part in kinds]


def _context_traffic(shape: Shape) -> list[Traffic]:
    """Clean keys and values of a layer, together, to every rank, and their gradients back, summed.

    AR and joint stage send the same: noisy keys stay where they are. Recomputed attention gathers again.
    """
    parallel = shape.parallel
    layers = shape.model.num_layers // parallel.pipeline_parallel
    again = 1 if parallel.recompute in (Recompute.selective, Recompute.full) else 0
    size, span = parallel.context_parallel, parallel.tensor_parallel * parallel.context_parallel
    count, message = shape.num_microbatches * layers, clean_keys_bytes(shape)
    return [
        Traffic("context", "all-gather", size, span, count * (1 + again), message),
        Traffic("context", "reduce-scatter", size, span, count, message),
    ]


def clean_keys_bytes(shape: Shape) -> int:
    """Clean keys and values of one layer and microbatch, of whole sequences, on a tensor-parallel rank."""
    width = 2 * shape.model.key_value_width // shape.parallel.tensor_parallel
    return shape.micro_batch_size * shape.sequence_length * width * shape.element_bytes


def _pipeline_traffic(shape: Shape) -> list[Traffic]:
    """Hidden states to the next stage and their gradients to the one before, for every model chunk."""
    parallel = shape.parallel
    virtual = parallel.virtual_pipeline_parallel
    span = parallel.tensor_parallel * shape.data_ranks * 2
    # Of two stages each is an end: nothing goes on from the last chunk, nothing back from the first.
    count = shape.num_microbatches * (2 * virtual - (1 if parallel.pipeline_parallel == 2 else 0))
    return [Traffic("pipeline", "send", 2, span, count, shape.stream_bytes)]


def _data_traffic(shape: Shape) -> list[Traffic]:
    """Gradients in fp32, each rank its share; updated weights back to all."""
    stages = shape.parallel.pipeline_parallel
    parameters = max(count_stage_parameters(shape, stage) for stage in range(stages))
    size, span = shape.data_ranks, shape.parallel.tensor_parallel * shape.data_ranks
    return [
        Traffic("data", "reduce-scatter", size, span, 1, parameters * FP32),
        Traffic("data", "all-gather", size, span, 1, parameters * shape.element_bytes),
    ]
