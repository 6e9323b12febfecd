"""Estimate the bytes a GPU sends per optimizer step, by group and collective.

Rings: of n bytes over g ranks, an all-gather or reduce-scatter sends n (g - 1) / g per rank, an all-reduce twice that.
"""

from dataclasses import dataclass

from conf.schema import Recompute
from launch.plan.buckets import find_buckets
from launch.plan.rank_shape import FP32, RankShape
from launch.plan.vision import image_gathering_bytes, list_vision_parameters, vision_gradient_bytes

# Consecutive ranks are tensor, then context, then data, then pipeline parallel (megatron-core's order).


@dataclass(frozen=True)
class Traffic:
    """Describes the collectives of one kind in one group.

    group: tensor, context, pipeline or data (which includes context). purpose: what is sent. size: ranks of the group.
    span: consecutive ranks that contain it. count: per step. num_bytes: of all `count` messages, each of them whole.
    """

    group: str
    operation: str
    purpose: str
    size: int
    span: int
    count: int
    num_bytes: int

    @property
    def message_bytes(self) -> int:
        """Bytes of a message, on average."""
        return self.num_bytes // self.count

    @property
    def sent_bytes(self) -> float:
        """Bytes that one GPU sends per step in all `count` collectives."""
        if self.operation == "send":
            return self.num_bytes
        share = (self.size - 1) / self.size
        return self.num_bytes * share * (2 if self.operation == "all-reduce" else 1)


def estimate_traffic(shape: RankShape) -> list[Traffic]:
    """Estimate what is sent in groups of more than one rank: of each kind, by the pipeline stage that sends most of it.

    Left out is what has a few bytes per position or step: counts, losses, the gradients' norm, the head's maxima and
    sums.
    """
    largest: dict[tuple[str, str, str], Traffic] = {}
    for pp_rank in range(shape.parallel.pipeline_parallel):
        for item in estimate_pipeline_stage_traffic(shape, pp_rank):
            key = item.group, item.operation, item.purpose
            largest[key] = max(item, largest.get(key, item), key=lambda one: one.num_bytes)
    return list(largest.values())


def estimate_pipeline_stage_traffic(shape: RankShape, pp_rank: int) -> list[Traffic]:
    """Estimate what a rank of one pipeline stage sends; see estimate_traffic."""
    parallel = shape.parallel
    traffic = []
    if parallel.tensor_parallel > 1:
        traffic += _tensor_traffic(shape, pp_rank)
    if parallel.context_parallel > 1:
        traffic += _context_traffic(shape)
    if parallel.pipeline_parallel > 1:
        traffic += _pipeline_traffic(shape, pp_rank)
    if shape.model.vision is not None and pp_rank == 0:
        traffic += _image_traffic(shape)
    if shape.data_ranks > 1:
        traffic += _data_traffic(shape, pp_rank)
    return traffic


def _tensor_traffic(shape: RankShape, pp_rank: int) -> list[Traffic]:
    """Count an all-reduce at the end of attention and MLP in the forward, and one at their beginning in the backward.

    With sequence parallelism these are reduce-scatters and all-gathers, the backward gathers the input of each once
    more for the gradient of its weights, and the gradients of norms, each formed from a rank's positions, are summed.
    """
    parallel = shape.parallel
    layers = shape.model.num_layers // parallel.pipeline_parallel
    recomputed = 1 if parallel.recompute is Recompute.full else 0
    is_first, is_last = pp_rank == 0, pp_rank == parallel.pipeline_parallel - 1
    whole = shape.num_positions * shape.model.hidden_size * shape.element_bytes
    scored = shape.num_scored_positions * shape.model.hidden_size * shape.element_bytes
    norms = FP32 * shape.model.hidden_size * (2 * layers + is_last)
    if parallel.sequence_parallel:
        kinds = [
            ("all-gather", "layers", layers * (6 + 2 * recomputed), whole),
            ("reduce-scatter", "layers", layers * (4 + 2 * recomputed), whole),
            ("all-gather", "embedding", int(is_first), whole),
            ("reduce-scatter", "embedding", int(is_first), whole),
            ("all-gather", "head", int(is_last), whole),
        ]
    else:
        kinds = [
            ("all-reduce", "layers", layers * (4 + 2 * recomputed), whole),
            ("all-reduce", "embedding", int(is_first), whole),
        ]
    kinds.append(("all-reduce", "head", int(is_last), scored))
    size = parallel.tensor_parallel
    traffic = [
        Traffic(
            "tensor", name, purpose, size, size, shape.num_microbatches * count, shape.num_microbatches * count * part
        )
        for name, purpose, count, part in kinds
        if count
    ]
    if parallel.sequence_parallel:
        traffic.append(Traffic("tensor", "all-reduce", "norms", size, size, 1, norms))
    return traffic


def _image_traffic(shape: RankShape) -> list[Traffic]:
    """Count the gathering of features, the sum of their gradients where ranks use different ones, and of the tower's.

    Images are dealt to tensor- and context-parallel ranks alike; the gradients of tower and projector are summed over
    tensor-parallel ranks once per step, tensor by tensor.
    """
    tensor, context = shape.parallel.tensor_parallel, shape.parallel.context_parallel
    size, features, count = tensor * context, image_gathering_bytes(shape), shape.num_microbatches
    traffic = []
    if size > 1 and features:
        traffic.append(Traffic("tensor", "all-gather", "images", size, size, count, count * features))
        users = size if shape.parallel.sequence_parallel else context
        if users > 1:
            traffic.append(Traffic("tensor", "all-reduce", "images", users, size, count, count * features))
    if tensor > 1:
        assert shape.model.vision is not None
        num_tensors = len(list_vision_parameters(shape.model.vision, shape.model.hidden_size))
        traffic.append(
            Traffic("tensor", "all-reduce", "tower", tensor, tensor, num_tensors, vision_gradient_bytes(shape))
        )
    return traffic


def _context_traffic(shape: RankShape) -> list[Traffic]:
    """Count the all-gather of a layer's clean keys and values, and the reduce-scatter of their gradients.

    AR and joint stage send the same, because noisy keys stay on their rank. Recomputed attention gathers again.
    """
    parallel = shape.parallel
    layers = shape.model.num_layers // parallel.pipeline_parallel
    recomputed = 1 if parallel.recompute in (Recompute.selective, Recompute.full) else 0
    size, span = parallel.context_parallel, parallel.tensor_parallel * parallel.context_parallel
    count, message = shape.num_microbatches * layers, clean_keys_bytes(shape)
    gathered = count * (1 + recomputed)
    return [
        Traffic("context", "all-gather", "keys", size, span, gathered, gathered * message),
        Traffic("context", "reduce-scatter", "keys", size, span, count, count * message),
    ]


def clean_keys_bytes(shape: RankShape) -> int:
    """Return the bytes of a layer's clean keys and values: one microbatch, whole sequences, a tensor-parallel rank."""
    width = 2 * shape.model.key_value_width // shape.parallel.tensor_parallel
    return shape.micro_batch_size * shape.sequence_length * width * shape.element_bytes


def _pipeline_traffic(shape: RankShape, pp_rank: int) -> list[Traffic]:
    """Count hidden states sent to the next pipeline stage and gradients sent back, for every model chunk."""
    parallel = shape.parallel
    # The last chunk sends no hidden states, the first one no gradients.
    chunks = 2 * parallel.virtual_pipeline_parallel - (pp_rank == 0) - (pp_rank == parallel.pipeline_parallel - 1)
    count, span = shape.num_microbatches * chunks, parallel.tensor_parallel * shape.data_ranks * 2
    return [Traffic("pipeline", "send", "hidden states", 2, span, count, count * shape.stream_bytes)]


def _data_traffic(shape: RankShape, pp_rank: int) -> list[Traffic]:
    """Count the reduce-scatter of fp32 gradients and the all-gather of updated weights, bucket by bucket."""
    buckets = find_buckets(shape, pp_rank)
    count, elements = len(buckets), sum(buckets)
    size, span = shape.data_ranks, shape.parallel.tensor_parallel * shape.data_ranks
    return [
        Traffic("data", "reduce-scatter", "gradients", size, span, count, elements * FP32),
        Traffic("data", "all-gather", "weights", size, span, count, elements * shape.element_bytes),
    ]
