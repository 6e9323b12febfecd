"""The processes of a job and what each computes on. No megatron-core here: other trainers use it too."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from conf.schema import Device
from conf.system.errors import UserError


def choose_device(device: Device) -> torch.device:
    """The device of this process; errors if CUDA is asked for and not there."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise UserError("runtime.device=cuda, but torch finds no CUDA device: use runtime.device=auto or cpu.")
    if device is Device.cpu or not torch.cuda.is_available():
        if torch.cuda.is_available():
            raise UserError("runtime.device=cpu on a machine with CUDA: hide the GPUs with CUDA_VISIBLE_DEVICES=''.")
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def decide_on_first_rank[Value](decide: Callable[[], Value]) -> Value:
    """What rank 0 decides, on every rank. All ranks together.

    Raises: on every rank the UserError or OSError of rank 0, so that none waits in vain, whatever launched them.
    """
    decided: list[Any] = list(_attempt(decide) if dist.get_rank() == 0 else (None, None))
    dist.broadcast_object_list(decided)
    value, error = decided
    if error is not None:
        raise error
    return value


def run_on_first_rank(action: Callable[[], object]) -> None:
    """Rank 0 runs `action` while the others wait. All ranks together. Raises: as decide_on_first_rank."""
    decide_on_first_rank(partial(_call, action))


def gather_over_ranks[Value](compute: Callable[[], Value]) -> list[Value]:
    """What every rank computes, by rank, on every rank. All ranks together.

    Raises: on every rank the first rank's UserError or OSError, whichever ranks failed.
    """
    attempts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(attempts, _attempt(compute))
    for _, error in attempts:
        if error is not None:
            raise error
    return [value for value, _ in attempts]


def run_on_every_rank(action: Callable[[], object]) -> None:
    """Every rank runs `action`; none goes on before all have. All ranks together. Raises: as gather_over_ranks."""
    gather_over_ranks(partial(_call, action))


def _call(action: Callable[[], object]) -> None:
    """Calls it; what it returns stays here, and need not be fit to be sent."""
    action()


def _attempt[Value](compute: Callable[[], Value]) -> tuple[Value | None, UserError | OSError | None]:
    """A value, or the error that the other ranks must hear of."""
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
    """A command without torchrun is a run of one process."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
