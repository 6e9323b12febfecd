"""Bytes of activations on one rank: what a layer keeps for its backward pass, and what passes through.

Read off what the model's operators save (model/megatron/{norm,swiglu}.py, model/attention/), per row: H hidden size,
F ffn_hidden_size, Q and K widths of all query and key heads, e bytes per element.

    norm           H e input + 4 bytes; its output H e is the next product's to keep (elementwise: not kept)
    attention      on the CPU Q e + 2K e laid out for its kernel; on a GPU (Q + 2K) e projected (values are a view
                   of it) + Q e + K e rotated; on both + Q e output + 4 bytes per head
                   with context parallelism Q e rotated + Q e output + 4 bytes per head, and 2K e per row of keys: the
                   rank's noisy ones and the gathered clean ones of whole sequences
    MLP            2F e gate and up + F e product (elementwise: not kept)

Checked against live tensors for the CPU's kernels (tests/launch/plan/test_memory.py); the GPU's differ in norms and
attention, and those two lines could not be checked there.
"""

from conf.schema import AttentionBackend, Recompute
from launch.plan.shape import FP32, Shape

TILE_COLUMNS = 960  # model/megatron/head.py: of the vocabulary at a time, in fp32 on the CPU
SPLIT_GROUP_ROWS = 128  # model/attention/split.py: rows of a group


def saved_by_layer(shape: Shape) -> int:
    """Bytes one layer keeps of one microbatch."""
    if shape.parallel.recompute is Recompute.full:
        return shape.stream_bytes
    return computed_by_layer(shape, shape.parallel.recompute)


def computed_by_layer(shape: Shape, recompute: Recompute) -> int:
    """Bytes one layer keeps between its forward and its backward, without recomputation of the whole layer."""
    norms = 2 * (_norm_input(shape) + shape.stream_bytes)
    if recompute is Recompute.elementwise:
        norms -= norm_outputs_made_again(shape)
    attention = _recomputed_attention(shape) if recompute is Recompute.selective else _attention(shape)
    return norms + attention + _mlp(shape, recompute)


def norm_outputs_made_again(shape: Shape) -> int:
    """Of one layer, under elementwise recomputation: both; Transformer Engine's norms are part of their product."""
    return 0 if shape.kernels.transformer_engine else 2 * shape.stream_bytes


def _norm_input(shape: Shape) -> int:
    """What a norm keeps of its input; what it gives is the next product's to keep."""
    return shape.stream_bytes + FP32 * shape.stream_rows


def _mlp(shape: Shape, recompute: Recompute) -> int:
    return (2 if recompute is Recompute.elementwise else 3) * ffn_bytes(shape)


def ffn_bytes(shape: Shape) -> int:
    """One tensor of the MLP's inner width."""
    return shape.rows * shape.model.ffn_hidden_size * shape.element_bytes // shape.parallel.tensor_parallel


def _heads(shape: Shape, widths: int) -> int:
    """Bytes of `widths` columns of queries, keys or values, split over the tensor-parallel ranks."""
    return shape.rows * widths * shape.element_bytes // shape.parallel.tensor_parallel


def _attention(shape: Shape) -> int:
    query, key = shape.model.query_width, shape.model.key_value_width
    normalisers = FP32 * shape.rows * shape.model.num_attention_heads // shape.parallel.tensor_parallel
    if shape.parallel.context_parallel > 1:
        pieces = _split_pieces(shape) if _on_cpu(shape) else 0
        return _heads(shape, query + query) + seen_keys_bytes(shape) + pieces + normalisers
    rotated = (query + 2 * key) if _on_cpu(shape) else (query + 2 * key) + query + key
    return _heads(shape, rotated + query) + normalisers


def _on_cpu(shape: Shape) -> bool:
    return shape.kernels.attention is AttentionBackend.split


def seen_keys_bytes(shape: Shape) -> int:
    """Keys and values that a rank's attention sees: its own, and with context parallelism all clean ones."""
    return 2 * shape.key_rows * shape.model.key_value_width * shape.element_bytes // shape.parallel.tensor_parallel


def _recomputed_attention(shape: Shape) -> int:
    """Inputs of the attention core (the queries as a copy) and its output."""
    query, key = shape.model.query_width, shape.model.key_value_width
    return _heads(shape, (query + 2 * key) + query + query)


def _split_pieces(shape: Shape) -> int:
    """What the pieces of model/attention/split.py keep besides: output before joining, mask, keys of each."""
    kept = _heads(shape, shape.model.query_width)
    for first, last in _split_groups(shape):
        if shape.doubled:
            kept += _noisy_group(shape, first, last)
        kept += (last - first) * last * shape.element_bytes  # mask
    return kept


def _split_groups(shape: Shape) -> list[tuple[int, int]]:
    """First and last row, in the sequence, of each group of a rank; of the first rank, for all do much the same."""
    length, chunk = shape.sequence_length, shape.local_length // 2
    spans = [(0, chunk), (length - chunk, length)]
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

    In the middle of its MLP the product has gone, whether it was kept or made again; its gradient, those of gate and up
    and one more of inner width have come. Under full recomputation all that a layer computes exists again beside its
    input.
    """
    recompute, again = shape.parallel.recompute, 0
    if recompute is Recompute.full:
        again = computed_by_layer(shape, Recompute.none) - shape.stream_bytes
    kept_product = 0 if recompute is Recompute.elementwise else ffn_bytes(shape)
    in_mlp = 4 * ffn_bytes(shape) - kept_product + 2 * shape.stream_bytes + _gathered(shape)
    return again + max(in_mlp, _context_backward(shape) - _mlp(shape, recompute))


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
    """One chunk's softmaxes, and gradients formed at once; the weight's goes into the gradient buffer."""
    hidden = shape.stream_bytes + _gathered(shape) + 2 * _scored(shape)
    rows, softmax = min(shape.chunk_rows, shape.scored_rows), FP32 * _vocabulary(shape)
    if shape.element_bytes == FP32:
        columns = min(TILE_COLUMNS, _vocabulary(shape)) if _on_cpu(shape) else _vocabulary(shape)
        return hidden + rows * (softmax + FP32 * columns)
    # Logits, their gradients in the weight's format, and their product.
    copies = 2 * shape.element_bytes * _vocabulary(shape)
    return hidden + rows * (softmax + copies) + shape.element_bytes * _head_weight(shape)


def _head_backward(shape: Shape) -> int:
    """The rows' gradients, and those of the stream they were taken from."""
    return 2 * _scored(shape) + shape.stream_bytes + _gathered(shape)


def _final_norm_backward(shape: Shape) -> int:
    """The CPU's goes back in fp32, step by step; on a GPU one kernel does."""
    return 4 * FP32 * shape.stream_rows * shape.model.hidden_size if _on_cpu(shape) else 0


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
