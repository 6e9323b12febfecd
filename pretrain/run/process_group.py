"""The processes of a job, what each computes on, and how they agree. Imports no megatron-core: lora/ uses it too."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from conf.schema import Device
from conf.system.entry import read_count, read_world_size
from conf.system.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """Names this process among those of the job. device: where it computes."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank talks to the user and writes the run folder."""
        return self.rank == 0


@contextmanager
def join_process_group(device: Device, timeout_minutes: float) -> Iterator[Ranks]:
    """Join the processes of torchrun's environment while the block runs; without torchrun this process is the only one.

    A process group that exists already is used and left alone. After an error ours is left alone too: taking it down
    would wait for peers that may be inside a collective; the process ends instead.
    """
    chosen = choose_device(device)
    owns_process_group = not dist.is_initialized()
    if owns_process_group:
        start_process_group(chosen, timeout_minutes)
    yield Ranks(dist.get_rank(), dist.get_world_size(), chosen)
    if owns_process_group:
        dist.destroy_process_group()


def choose_device(device: Device) -> torch.device:
    """Return the device of this process. Raises: UserError if CUDA is asked for and not there, or hidden by CPU."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise UserError("runtime.device=cuda, but torch finds no CUDA device: use runtime.device=auto or cpu.")
    if device is Device.cpu or not torch.cuda.is_available():
        if torch.cuda.is_available():
            raise UserError("runtime.device=cpu on a machine with CUDA: hide the GPUs with CUDA_VISIBLE_DEVICES=''.")
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def decide_on_first_rank[Value](decide: Callable[[], Value]) -> Value:
    """Return on every rank what rank 0 decides. All ranks call this together.

    Raises: the UserError or OSError of rank 0, on every rank, so that none waits in vain.
    """
    decided: list[Any] = list(_attempt(decide) if dist.get_rank() == 0 else (None, None))
    dist.broadcast_object_list(decided)
    value, error = decided
    if error is not None:
        raise error
    return value


def run_on_first_rank(action: Callable[[], object]) -> None:
    """Run `action` on rank 0 while the others wait. All ranks call this together. Raises: as decide_on_first_rank."""
    decide_on_first_rank(partial(_call, action))


def gather_over_ranks[Value](compute: Callable[[], Value]) -> list[Value]:
    """Return on every rank what each rank computes, ordered by rank. All ranks call this together.

    Raises: on every rank the UserError or OSError of the lowest rank that failed.
    """
    attempts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(attempts, _attempt(compute))
    for _, error in attempts:
        if error is not None:
            raise error
    return [value for value, _ in attempts]


def run_on_every_rank(action: Callable[[], object]) -> None:
    """Run `action` on every rank; none goes on before all have. Raises: as gather_over_ranks."""
    gather_over_ranks(partial(_call, action))


def _call(action: Callable[[], object]) -> None:
    """Call `action` and drop its result, which need not be fit to be sent to other ranks."""
    action()


def _attempt[Value](compute: Callable[[], Value]) -> tuple[Value | None, UserError | OSError | None]:
    """Return the value, or the error that the other ranks must hear of."""
    try:
        return compute(), None
    except (UserError, OSError) as error:
        return None, error


def start_process_group(device: torch.device, timeout_minutes: float) -> None:
    """Join the processes of torchrun's environment; without one this process is the only one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _default_single_process_environment()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))


def _default_single_process_environment() -> None:
    """Describe a group of one process to torch where torchrun has described none.

    Raises: UserError if the environment describes a group by halves.
    """
    if "RANK" in os.environ:
        _check_environment()
        return
    if read_world_size() > 1:
        raise UserError(
            f"the environment says WORLD_SIZE={os.environ['WORLD_SIZE']} without RANK: start with torchrun, which sets "
            "both, or unset WORLD_SIZE"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _check_environment() -> None:
    """Check what torch reads of a group of processes. Raises: UserError naming what is missing or wrong."""
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"the environment says RANK={os.environ['RANK']} without {', '.join(missing)}: start with torchrun, which "
            "sets them all, or unset RANK"
        )
    rank, world_size = read_count("RANK", smallest=0), read_world_size()
    read_count("MASTER_PORT", smallest=1)
    if rank >= world_size:
        raise UserError(f"the environment says RANK={rank} of WORLD_SIZE={world_size}: ranks begin at 0")
