"""The processes of a job and what each computes on. No megatron-core here: other trainers use it too."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from conf.errors import UserError
from conf.schema import Device


def choose_device(device: Device) -> torch.device:
    """The device of this process; errors if CUDA is asked for and not there."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise UserError("runtime.device=cuda, but torch finds no CUDA device: use runtime.device=auto or cpu.")
    if device is Device.cpu or not torch.cuda.is_available():
        if torch.cuda.is_available():
            raise UserError("runtime.device=cpu on a machine with CUDA: hide the GPUs with CUDA_VISIBLE_DEVICES=''.")
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def run_on_first_rank(action: Callable[[], object]) -> None:
    """Rank 0 runs `action` while the others wait. All ranks together.

    Raises: on every rank the UserError or OSError of rank 0, so that none waits in vain, whatever launched them.
    """
    failure: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except (UserError, OSError) as error:
            failure = [error]
    dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]


def decide_on_first_rank[Value](decide: Callable[[], Value]) -> Value:
    """What rank 0 decides, on every rank. All ranks together. Raises: its UserError or OSError, on every rank."""
    decided: list[Any] = []
    run_on_first_rank(lambda: decided.append(decide()))
    shared = decided or [None]
    dist.broadcast_object_list(shared)
    return shared[0]


def run_on_every_rank(action: Callable[[], object]) -> None:
    """Every rank runs `action`; none goes on before all have. All ranks together.

    Raises: on every rank the first rank's UserError or OSError, whichever ranks failed.
    """
    failure: UserError | OSError | None = None
    try:
        action()
    except (UserError, OSError) as error:
        failure = error
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if failure := next((found for found in failures if found is not None), None):
        raise failure


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
