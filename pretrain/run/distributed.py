"""Processes, devices and megatron-core's process groups of a run."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from conf.schema import ParallelConfig, RuntimeConfig
from model.megatron import cpu
from pretrain.run.process_group import choose_device, start_process_group


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. device: what it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank talks to the user and writes the run folder."""
        return self.rank == 0

    @property
    def data_parallel_rank(self) -> int:
        """Index among the groups of ranks that train on different sequences; context-parallel ranks share one."""
        return parallel_state.get_data_parallel_rank()

    @property
    def data_parallel_size(self) -> int:
        """Groups of ranks that train on different sequences."""
        return parallel_state.get_data_parallel_world_size()


@contextmanager
def distributed_session(parallel: ParallelConfig, runtime: RuntimeConfig, seed: int) -> Iterator[Ranks]:
    """Process group (from torchrun's environment, or of a single process) and megatron-core's groups, while it lasts.

    A process group that exists already is used and left alone.
    """
    device = choose_device(runtime.device)
    cpu.install()
    owns_process_group = not dist.is_initialized()
    if owns_process_group:
        start_process_group(device, runtime.timeout_minutes)
    virtual = parallel.virtual_pipeline_parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel,
        context_parallel_size=parallel.context_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        distributed_timeout_minutes=math.ceil(runtime.timeout_minutes),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    # Not after an error: taking groups down waits for peers that may be inside a collective; the process ends instead.
    parallel_state.destroy_model_parallel()
    if owns_process_group:
        dist.destroy_process_group()
