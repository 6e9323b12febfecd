"""megatron-core's process groups of a layout."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core import parallel_state, tensor_parallel

from conf.schema import ParallelConfig, RuntimeConfig
from model.megatron import cpu
from pretrain.run.process_group import Ranks, join_process_group


@contextmanager
def model_parallel_groups(parallel: ParallelConfig, timeout_minutes: float, seed: int) -> Iterator[None]:
    """Set up megatron-core's groups within the joined process group, and its random state, while the block runs."""
    cpu.install()
    virtual = parallel.virtual_pipeline_parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel,
        context_parallel_size=parallel.context_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        distributed_timeout_minutes=math.ceil(timeout_minutes),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    yield
    # Not after an error: taking groups down waits for peers that may be inside a collective; the process ends instead.
    parallel_state.destroy_model_parallel()


@contextmanager
def distributed_session(parallel: ParallelConfig, runtime: RuntimeConfig, seed: int) -> Iterator[Ranks]:
    """Join the processes and set up megatron-core's groups without a run folder, for tools and tests."""
    processes = join_process_group(runtime.device, runtime.timeout_minutes)
    with processes as ranks, model_parallel_groups(parallel, runtime.timeout_minutes, seed):
        yield ranks
