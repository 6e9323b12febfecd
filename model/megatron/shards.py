"""Find the parts of global weight tensors that a rank holds, by name."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor, nn


def iterate_local_shards(chunks: Sequence[nn.Module]) -> Iterator[ShardedTensor]:
    """Yield the chunks' ShardedTensors: key, global_shape, global_offset, and `data`, a view of the live weight."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for chunk in chunks:
        state: Any = chunk.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        apply_factories(state)
        yield from (value for value in nested_values(state) if isinstance(value, ShardedTensor))


def copy_local_slice(shard: ShardedTensor, full: Tensor) -> None:
    """Write this rank's part of a global tensor into the live weight (in the weight's dtype)."""
    assert tuple(full.shape) == tuple(shard.global_shape), f"{shard.key}: {full.shape} for {shard.global_shape}"
    assert shard.data is not None
    ends = (start + size for start, size in zip(shard.global_offset, shard.local_shape, strict=True))
    part = tuple(slice(start, end) for start, end in zip(shard.global_offset, ends, strict=True))
    with torch.no_grad():
        shard.data.copy_(full[part])
