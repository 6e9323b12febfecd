"""Cut a pipeline stage's parameters into the buckets that megatron-core reduces and gathers together.

Parameters lie in a buffer in reverse order, each from a multiple of PARAMETER_START on; a bucket is full when it has
`parallel.bucket_parameters`, and ends where all data-parallel ranks get equal parts. Without overlap, on later pipeline
stages and for later chunks of an interleaved one there is one bucket. Source: megatron-core's distrib_optimizer.py and
distributed_data_parallel.py.
"""

from math import lcm

from launch.plan.rank_shape import RankShape
from launch.plan.vision import list_vision_parameters

PARAMETER_START, BUCKET_END = 64, 128
DEFAULT_SIZE, DEFAULT_SIZE_PER_RANK = 40_000_000, 1_000_000


def find_buckets(shape: RankShape, pp_rank: int) -> list[int]:
    """Return the elements of every bucket of a pipeline stage, padding included."""
    buckets = []
    for chunk in range(shape.parallel.virtual_pipeline_parallel):
        is_cut = shape.parallel.overlap_grad_reduce and pp_rank == 0 and chunk == 0
        buckets += _cut(
            list_parameters(shape, pp_rank, chunk), _bucket_size(shape) if is_cut else None, shape.data_ranks
        )
    return buckets


def list_parameters(shape: RankShape, pp_rank: int, chunk: int) -> list[int]:
    """Return the elements of each parameter on a rank, in the order of the model."""
    model, degree = shape.model, shape.parallel.tensor_parallel
    hidden, ffn = model.hidden_size, model.ffn_hidden_size // degree
    query, key = model.query_width // degree, model.key_value_width // degree
    layer = [hidden, query * hidden, (query + 2 * key) * hidden, hidden, 2 * ffn * hidden, ffn * hidden]
    vocabulary = model.vocab_size // degree * hidden
    last_stage, last_chunk = shape.parallel.pipeline_parallel - 1, shape.parallel.virtual_pipeline_parallel - 1
    embedding = [vocabulary] if (pp_rank, chunk) == (0, 0) else []
    head = [hidden, vocabulary] if (pp_rank, chunk) == (last_stage, last_chunk) else []
    if embedding and model.vision is not None:
        embedding += list_vision_parameters(model.vision, hidden)
    return embedding + layer * shape.layers_per_chunk + head


def _bucket_size(shape: RankShape) -> int:
    return shape.parallel.bucket_parameters or max(DEFAULT_SIZE, DEFAULT_SIZE_PER_RANK * shape.data_parallel)


def _cut(parameters: list[int], size: int | None, num_ranks: int) -> list[int]:
    buckets, start, end = [], 0, 0
    for index, parameter in enumerate(reversed(parameters)):
        end = _pad(end, PARAMETER_START) + parameter
        if index == len(parameters) - 1 or (size is not None and end - start >= size):
            end = _pad(end, lcm(num_ranks, BUCKET_END))
            buckets.append(end - start)
            start = end
    return buckets


def _pad(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
