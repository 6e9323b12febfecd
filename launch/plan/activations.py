"""Bytes of activations on one rank: what a layer keeps for its backward pass, and what passes through.

Read off what the model's operators save (model/spec.py, model/attention/, megatron-core's MLP and attention), per row:
H hidden size, F ffn_hidden_size, Q and K widths of all query and key heads, e bytes per element, T tensor parallel.

    norm           H e input + H e output (Transformer Engine); megatron-core's keep input and normalised input in fp32
    attention      (Q + 2K) e projected (values are a view of it) + Q e + K e rotated + Q e output + 4 bytes per head
                   with context parallelism Q e rotated + Q e output + 4 bytes per head, and 2K e per row of keys: the
                   rank's noisy ones and the gathered clean ones of whole sequences
    MLP            2F e gate and up + F e SiLU + F e up once more (`+ glu_linear_offset`) + F e product

Checked against live tensors for the CPU's kernels (tests/launch/plan/test_memory.py); the GPU's differ in norms and
attention, and those two lines could not be checked there.
"""

from conf.schema import AttentionBackend, Recompute
from launch.plan.shape import FP32, Shape

SPLIT_GROUP_ROWS = 128  # model/attention/split.py: rows of a group of noisy rows


def saved_by_layer(shape: Shape) -> int:
    """Bytes one layer keeps of one microbatch."""
    if shape.parallel.recompute is Recompute.full:
        return shape.stream_bytes
    return computed_by_layer(shape, shape.parallel.recompute is Recompute.selective)


def computed_by_layer(shape: Shape, selective: bool = False) -> int:
    """Bytes one layer keeps between its forward and its backward, without recomputation of the whole layer."""
    norms = 2 * (_norm_input(shape) + shape.stream_bytes)
    attention = _recomputed_attention(shape) if selective else _attention(shape)
    return norms + attention + _mlp(shape)


def _norm_input(shape: Shape) -> int:
    """What a norm keeps of its input; what it gives is the next product's to keep."""
    statistics = FP32 * shape.stream_rows
    if shape.kernels.transformer_engine:
        return shape.stream_bytes + statistics
    return 2 * FP32 * shape.stream_rows * shape.model.hidden_size + statistics


def _mlp(shape: Shape) -> int:
    return 5 * ffn_bytes(shape)


def ffn_bytes(shape: Shape) -> int:
    """One tensor of the MLP's inner width."""
    return shape.rows * shape.model.ffn_hidden_size * shape.element_bytes // shape.parallel.tensor_parallel


def _heads(shape: Shape, widths: int) -> int:
    """Bytes of `widths` columns of queries, keys or values, split over the tensor-parallel ranks."""
    return shape.rows * widths * shape.element_bytes // shape.parallel.tensor_parallel


def _attention(shape: Shape) -> int:
    query, key = shape.model.query_width, shape.model.key_value_width
    kept = FP32 * shape.rows * shape.model.num_attention_heads // shape.parallel.tensor_parallel
    if shape.parallel.context_parallel > 1:
        kept += _heads(shape, query + query) + seen_keys_bytes(shape)
    else:
        kept += _heads(shape, (query + 2 * key) + query + key + query)
    if shape.kernels.attention is AttentionBackend.split:
        kept += _split_pieces(shape)
    return kept


def seen_keys_bytes(shape: Shape) -> int:
    """Keys and values that a rank's attention sees: its own, and with context parallelism all clean ones."""
    return 2 * shape.key_rows * shape.model.key_value_width * shape.element_bytes // shape.parallel.tensor_parallel


def _recomputed_attention(shape: Shape) -> int:
    """Inputs of the attention core (the queries as a copy) and its output."""
    query, key = shape.model.query_width, shape.model.key_value_width
    return _heads(shape, (query + 2 * key) + query + query)


def _split_pieces(shape: Shape) -> int:
    """What the pieces of model/attention/split.py keep besides: output before joining, mask, keys of each."""
    is_whole = shape.parallel.context_parallel == 1
    if is_whole and not shape.doubled:
        return 0
    kept = _heads(shape, shape.model.query_width)
    for first, last in _split_groups(shape):
        if shape.doubled:
            kept += _noisy_group(shape, first, last)
        if not is_whole:
            kept += (last - first) * last * shape.element_bytes  # mask
    return kept


def _split_groups(shape: Shape) -> list[tuple[int, int]]:
    """First and last row, in the sequence, of each group of a rank; of the first rank, for all do much the same."""
    length, chunk = shape.sequence_length, shape.local_length // 2
    spans = [(0, length)] if shape.parallel.context_parallel == 1 else [(0, chunk), (length - chunk, length)]
    step = SPLIT_GROUP_ROWS
    return [(first, min(first + step, stop)) for start, stop in spans for first in range(start, stop, step)]


def _noisy_group(shape: Shape, first: int, last: int) -> int:
    """Keys and values of a group of noisy rows, gathered, and its mask as numbers."""
    key_width = shape.model.key_value_width // shape.parallel.tensor_parallel
    start, end = first // shape.block_size, -(-last // shape.block_size)
    prefix, own = (end - 1) * shape.block_size, (end - start) * shape.block_size
    keys = 2 * shape.micro_batch_size * (prefix + own) * key_width
    mask = (last - first) * (prefix + own) if end - start > 1 else 0
    return (keys + mask) * shape.element_bytes


def layer_backward(shape: Shape) -> int:
    """Most bytes in use, beyond what is kept, while the backward passes a layer.

    In the middle of its MLP the product has gone and three gradients of inner width have come. Under full recomputation
    all that a layer computes exists again beside its input.
    """
    again = 0
    if shape.parallel.recompute is Recompute.full:
        again = computed_by_layer(shape) - (0 if norm_copies(shape) else shape.stream_bytes)
    in_mlp = 2 * ffn_bytes(shape) + 2 * shape.stream_bytes + _gathered(shape)
    return again + max(in_mlp, _context_backward(shape) - _mlp(shape))


def _context_backward(shape: Shape) -> int:
    """Where gradients of gathered keys and values are about to be sent: these, and once more as they are sent.

    What the MLP kept has gone by then. Where attention alone is recomputed its keys and values are there again.
    """
    if shape.parallel.context_parallel == 1:
        return 0
    recomputed = seen_keys_bytes(shape) if shape.parallel.recompute is Recompute.selective else 0
    return recomputed + 2 * seen_keys_bytes(shape) + shape.stream_bytes


def scoring(shape: Shape) -> int:
    """Most bytes from the final norm's forward to its backward: logits, the gradients formed with them, the norm's."""
    return _norm_input(shape) + max(_head_forward(shape), _head_backward(shape), _final_norm_backward(shape))


def _head_forward(shape: Shape) -> int:
    """One chunk's logits, and gradients formed at once (model/head.py)."""
    hidden = shape.stream_bytes + _gathered(shape) + 2 * _scored(shape)
    logits = min(shape.chunk_rows, shape.scored_rows) * _vocabulary(shape)
    copied = shape.element_bytes if shape.element_bytes < FP32 else 0
    while_scoring = logits * (FP32 + copied)
    while_adding = (logits + _head_weight(shape)) * shape.element_bytes
    return hidden + FP32 * _head_weight(shape) + max(while_scoring, while_adding)


def _head_backward(shape: Shape) -> int:
    """Gradients as they were formed, scaled, and the weight's once more in its own format."""
    copied = shape.element_bytes if shape.element_bytes < FP32 else 0
    return 2 * _scored(shape) + (2 * FP32 + copied) * _head_weight(shape)


def _final_norm_backward(shape: Shape) -> int:
    """megatron-core's norm goes back in fp32, step by step; Transformer Engine's in one kernel."""
    return 0 if shape.kernels.transformer_engine else 4 * FP32 * shape.stream_rows * shape.model.hidden_size


def norm_copies(shape: Shape) -> bool:
    """Whether a norm keeps an fp32 copy instead of its input."""
    return not shape.kernels.transformer_engine and shape.element_bytes < FP32


def _gathered(shape: Shape) -> int:
    """The whole residual stream, gathered for a product, where it is split."""
    whole = shape.rows * shape.model.hidden_size * shape.element_bytes
    return whole if shape.parallel.sequence_parallel else 0


def _scored(shape: Shape) -> int:
    return shape.scored_rows * shape.model.hidden_size * shape.element_bytes


def _vocabulary(shape: Shape) -> int:
    return shape.model.vocab_size // shape.parallel.tensor_parallel


def _head_weight(shape: Shape) -> int:
    """Parameters of the head on a rank."""
    return _vocabulary(shape) * shape.model.hidden_size
