"""Estimate bytes of activations on one rank: those a layer saves for its backward pass, and transient ones.

Derived from what the model's operators save (model/megatron/{norm,swiglu}.py, model/attention/), per position: H hidden
size, F ffn_hidden_size, Q and K widths of all query and key heads, e bytes per element.

    norm           H e input + 4 bytes; its output H e is saved by the next matmul (elementwise: not saved)
    attention      on the CPU Q e + 2K e laid out for its kernel; on a GPU (Q + 2K) e projected (values are a view
                   of it) + Q e + K e rotated; on both + Q e output + 4 bytes per head
                   with context parallelism Q e rotated + Q e output + 4 bytes per head, and 2K e per position of keys:
                   the rank's noisy ones and the gathered clean ones of whole sequences
    MLP            2F e gate and up + F e output of SwiGLU (elementwise: not saved)

Tested against live tensors with the CPU's kernels (tests/launch/plan/test_memory.py). The GPU's kernels differ in norms
and attention; those two lines are untested.
"""

from conf.schema import AttentionBackend, Recompute
from launch.plan.rank_shape import FP32, RankShape

TILE_COLUMNS = 960  # columns of the vocabulary at a time in fp32 on the CPU (model/megatron/head.py)
GROUP_SIZE = 128  # queries of a group (model/attention/grouped.py)


def saved_by_layer(shape: RankShape) -> int:
    """Return the bytes one layer saves of one microbatch."""
    if shape.parallel.recompute is Recompute.full:
        return shape.stream_bytes
    return computed_by_layer(shape, shape.parallel.recompute)


def computed_by_layer(shape: RankShape, recompute: Recompute) -> int:
    """Return the bytes one layer saves between forward and backward if it is not recomputed as a whole."""
    norms = 2 * (_norm_input(shape) + shape.stream_bytes)
    if recompute is Recompute.elementwise:
        norms -= recomputed_norm_outputs(shape)
    attention = _recomputed_attention(shape) if recompute is Recompute.selective else _attention(shape)
    return norms + attention + _mlp(shape, recompute)


def recomputed_norm_outputs(shape: RankShape) -> int:
    """Return the bytes of a layer's norm outputs that elementwise recomputation frees.

    Transformer Engine fuses norms into their matmuls, and saves no outputs.
    """
    return 0 if shape.kernels.transformer_engine else 2 * shape.stream_bytes


def _norm_input(shape: RankShape) -> int:
    """Return what a norm saves: its input and a statistic. Its output is saved by the next matmul."""
    return shape.stream_bytes + FP32 * shape.num_stream_positions


def _mlp(shape: RankShape, recompute: Recompute) -> int:
    return (2 if recompute is Recompute.elementwise else 3) * ffn_bytes(shape)


def ffn_bytes(shape: RankShape) -> int:
    """Return the bytes of one tensor of the MLP's inner width."""
    return shape.num_positions * shape.model.ffn_hidden_size * shape.element_bytes // shape.parallel.tensor_parallel


def _heads(shape: RankShape, widths: int) -> int:
    """Return the bytes of `widths` columns of queries, keys or values, split over the tensor-parallel ranks."""
    return shape.num_positions * widths * shape.element_bytes // shape.parallel.tensor_parallel


def _attention(shape: RankShape) -> int:
    query, key = shape.model.query_width, shape.model.key_value_width
    normalisers = FP32 * shape.num_positions * shape.model.num_attention_heads // shape.parallel.tensor_parallel
    if shape.parallel.context_parallel > 1:
        groups = _group_bytes(shape) if _on_cpu(shape) else 0
        return _heads(shape, query + query) + seen_keys_bytes(shape) + groups + normalisers
    rotated = (query + 2 * key) if _on_cpu(shape) else (query + 2 * key) + query + key
    return _heads(shape, rotated + query) + normalisers


def _on_cpu(shape: RankShape) -> bool:
    return shape.kernels.attention is AttentionBackend.cpu


def seen_keys_bytes(shape: RankShape) -> int:
    """Return the bytes of keys and values that a rank's attention sees."""
    width = 2 * shape.model.key_value_width * shape.element_bytes
    return shape.num_key_positions * width // shape.parallel.tensor_parallel


def _recomputed_attention(shape: RankShape) -> int:
    """Return the inputs of the attention core (with a copy of the queries) and its output."""
    query, key = shape.model.query_width, shape.model.key_value_width
    return _heads(shape, (query + 2 * key) + query + query)


def _group_bytes(shape: RankShape) -> int:
    """Return what the groups of model/attention/grouped.py save in addition: output before joining, mask, keys."""
    saved = _heads(shape, shape.model.query_width)
    for first, last in _cut_into_groups(shape):
        if shape.noisy_length:
            saved += _noisy_group(shape, first, last)
        saved += (last - first) * last * shape.element_bytes  # mask
    return saved


def _cut_into_groups(shape: RankShape) -> list[tuple[int, int]]:
    """Return the first and last position of each query group of the first rank; the others do nearly the same work."""
    length, chunk = shape.sequence_length, shape.local_length // 2
    chunks = [(0, chunk), (length - chunk, length)]
    step = GROUP_SIZE
    return [(first, min(first + step, stop)) for start, stop in chunks for first in range(start, stop, step)]


def _noisy_group(shape: RankShape, first: int, last: int) -> int:
    """Return the bytes of the keys and values gathered for a group of noisy queries, and of its mask as numbers."""
    key_width = shape.model.key_value_width // shape.parallel.tensor_parallel
    start, end = first // shape.block_size, -(-last // shape.block_size)
    prefix, own = (end - 1) * shape.block_size, (end - start) * shape.block_size
    keys = 2 * shape.micro_batch_size * (prefix + own) * key_width
    mask = (last - first) * (prefix + own) if end - start > 1 else 0
    return (keys + mask) * shape.element_bytes


def layer_backward(shape: RankShape) -> int:
    """Return the most bytes in use, beyond what is saved, during the backward of a layer.

    In the middle of the MLP, SwiGLU's output is freed, whether it was saved or recomputed. Its gradient, those of gate
    and up and one more tensor of inner width are in use. Under full recomputation everything a layer computes exists
    again in addition to its input.
    """
    recompute, recomputed = shape.parallel.recompute, 0
    if recompute is Recompute.full:
        recomputed = computed_by_layer(shape, Recompute.none) - shape.stream_bytes
    saved_output = 0 if recompute is Recompute.elementwise else ffn_bytes(shape)
    in_mlp = 4 * ffn_bytes(shape) - saved_output + 2 * shape.stream_bytes + _gathered(shape)
    return recomputed + max(in_mlp, _context_backward(shape) - _mlp(shape, recompute))


def _context_backward(shape: RankShape) -> int:
    """Return the bytes in use when gradients of gathered keys and values are sent: the gradients and a copy.

    What the MLP saved is freed by then. If attention is recomputed, its keys and values exist again.
    """
    if shape.parallel.context_parallel == 1:
        return 0
    recomputed = seen_keys_bytes(shape) if shape.parallel.recompute is Recompute.selective else 0
    return recomputed + 2 * seen_keys_bytes(shape) + shape.stream_bytes


def scoring(shape: RankShape) -> int:
    """Return the most bytes in use from the final norm's forward to its backward, with logits and their gradients."""
    return _norm_input(shape) + max(_head_forward(shape), _head_backward(shape), _final_norm_backward(shape))


def _head_forward(shape: RankShape) -> int:
    """Return the bytes of one chunk's softmax and gradients; the weight's gradient goes into the gradient buffer."""
    hidden = shape.stream_bytes + _gathered(shape) + 2 * _scored(shape)
    chunk, softmax = min(shape.scored_chunk_size, shape.num_scored_positions), FP32 * _vocabulary(shape)
    if shape.element_bytes == FP32:
        columns = min(TILE_COLUMNS, _vocabulary(shape)) if _on_cpu(shape) else _vocabulary(shape)
        return hidden + chunk * (softmax + FP32 * columns)
    # Logits, their gradients in the weight's format, and the matmul of both.
    copies = 2 * shape.element_bytes * _vocabulary(shape)
    return hidden + chunk * (softmax + copies) + shape.element_bytes * _head_weight(shape)


def _head_backward(shape: RankShape) -> int:
    """Return the bytes of the gradients of scored positions, and of the stream they were selected from."""
    return 2 * _scored(shape) + shape.stream_bytes + _gathered(shape)


def _final_norm_backward(shape: RankShape) -> int:
    """Return the bytes of the fp32 steps of the CPU's norm backward; on a GPU it is one kernel."""
    return 4 * FP32 * shape.num_stream_positions * shape.model.hidden_size if _on_cpu(shape) else 0


def _gathered(shape: RankShape) -> int:
    """Return the bytes of the whole residual stream, gathered for a matmul if it is split."""
    whole = shape.num_positions * shape.model.hidden_size * shape.element_bytes
    return whole if shape.parallel.sequence_parallel else 0


def _scored(shape: RankShape) -> int:
    return shape.num_scored_positions * shape.model.hidden_size * shape.element_bytes


def _vocabulary(shape: RankShape) -> int:
    return shape.model.vocab_size // shape.parallel.tensor_parallel


def _head_weight(shape: RankShape) -> int:
    """Return the number of the head's parameters on a rank."""
    return _vocabulary(shape) * shape.model.hidden_size
