"""Processes, devices and megatron-core's process groups of a run."""

import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from conf.errors import UserError
from conf.schema import Device, ParallelConfig, RuntimeConfig
from model import cpu


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
        """Index among the model's copies."""
        return parallel_state.get_data_parallel_rank()

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model."""
        return parallel_state.get_data_parallel_world_size()


def choose_device(device: Device) -> torch.device:
    """The device of this process; errors if CUDA is asked for and not there."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise UserError("runtime.device=cuda, but torch finds no CUDA device: use runtime.device=auto or cpu.")
    if device is Device.cpu or not torch.cuda.is_available():
        if torch.cuda.is_available():
            raise UserError("runtime.device=cpu on a machine with CUDA: hide the GPUs with CUDA_VISIBLE_DEVICES=''.")
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def distributed_session(parallel: ParallelConfig, runtime: RuntimeConfig, seed: int) -> Iterator[Ranks]:
    """Process group (from torchrun's environment, or of a single process) and megatron-core's groups, while it lasts.

    A process group that exists already is used and left alone.
    """
    device = choose_device(runtime.device)
    cpu.install()
    owns_process_group = not dist.is_initialized()
    if owns_process_group:
        _start_process_group(device, runtime.timeout_minutes)
    virtual = parallel.virtual_pipeline_parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel,
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


def _start_process_group(device: torch.device, timeout_minutes: float) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _default_single_process_environment()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))


def _default_single_process_environment() -> None:
    """`python -m pretrain.train` without torchrun is a run of one process."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
