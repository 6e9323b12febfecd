"""Weights and optimizer state as megatron-core saves them: which part of which global tensor this rank holds.

What is written under one layout can be read back under any other.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from model.checkpoint.checksums import write_part
from pretrain.checkpointing.helper_processes import SharedQueue, end_with_parent
from pretrain.run.step_directory import DeferredErrors
from pretrain.step.optimizer import accept_step_tensors, prepare_for_loading, repair_after_loading

_results: SharedQueue | None = None  # what background writers report to their rank
# Errors of what rank 0 writes after all tensors (`.metadata`, `metadata.json`), while the others wait for it.
_late_errors = DeferredErrors()


def build_sharded_state(chunks: list[Any], optimizer: MegatronOptimizer, is_loading: bool) -> dict[str, Any]:
    """Build megatron-core's description of which part of which global tensor this rank holds."""
    metadata = {
        # Optimizer state addressed by parameter, so that it survives any change of layout.
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": _data_parallel_group(),
    }
    state: Any = {
        f"model{index}": chunk.module.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)
    }
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def gather_parameters(chunks: list[Any]) -> None:
    """Bring updated weights to every rank: overlapped gathering would do so only in the next forward."""
    with torch.no_grad():
        for chunk in chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def load_checkpoint(step_dir: Path, chunks: list[Any], optimizer: MegatronOptimizer) -> None:
    """Read weights and optimizer state of a step directory into a live model of any layout."""
    accept_step_tensors()
    prepare_for_loading(optimizer)
    state = build_sharded_state(chunks, optimizer, is_loading=True)
    # Every data-parallel rank reads its share and they exchange: each byte leaves the disk once.
    strategy: Any = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), _data_parallel_group())
    loaded: Any = dist_checkpointing.load(state, str(step_dir), strategy)
    for index, chunk in enumerate(chunks):
        missing, unexpected = chunk.module.load_state_dict(loaded[f"model{index}"], strict=False)
        missing = [key for key in missing if not key.endswith("_extra_state")]
        assert not missing and not unexpected, f"{step_dir}: missing {missing}, unexpected {unexpected}"
    optimizer.load_state_dict(loaded["optimizer"])
    repair_after_loading(optimizer)


def build_save_strategy() -> Any:
    """Build a strategy by which every data-parallel rank writes a share of what its peers hold too."""
    global _results
    if _results is None or not _results.is_alive:  # megatron-core's own would outlive a killed rank
        _results = SharedQueue()
        filesystem_async._results_queue = _results.queue
    return FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), _data_parallel_group())


def count_bytes(state: Any) -> int:
    """Return the bytes this rank will write: of the tensors it is the first holder of."""
    if isinstance(state, dict):
        return sum(count_bytes(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(count_bytes(value) for value in state)
    data = getattr(state, "data", None)
    replica = getattr(state, "replica_id", 0)
    is_first = not any(replica) if isinstance(replica, tuple) else replica == 0
    return data.numel() * data.element_size() if is_first and isinstance(data, Tensor) else 0


def _data_parallel_group() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def defer_late_errors() -> None:
    """Keep errors of megatron-core's last writes on rank 0 for `raise_late_error`; called before the first save."""
    writer: Any = filesystem_async.FileSystemWriterAsync
    if not hasattr(writer.finish, "is_deferring"):
        writer.finish = _late_errors.deferring(writer.finish)
        writer.finish.is_deferring = True
        serialization.save_config = _late_errors.deferring(serialization.save_config)


def raise_late_error() -> None:
    """Raise the first OSError that was kept since the last call."""
    _late_errors.raise_first()


def sum_own_files(directory: Path, rank: int) -> None:
    """Sum the files this rank wrote; megatron-core names them by rank. Raises: OSError."""
    write_part(directory, sorted(path.name for path in directory.glob(f"__{rank}_*")), rank)


def summing(write: Callable[..., Any] | None, directory: Path) -> Callable[..., Any] | None:
    """Return megatron-core's background writer, made to sum what it wrote and to end with its rank."""
    return partial(_write_and_sum, write, directory, dist.get_rank(), os.getpid()) if write else None


def _write_and_sum(
    write: Callable[..., Any], directory: Path, rank: int, parent: int, *arguments: Any, **options: Any
) -> None:
    end_with_parent(parent)
    write(*arguments, **options)
    with suppress(OSError):  # whoever completes the checkpoint sums what has no sum yet
        sum_own_files(directory, rank)
