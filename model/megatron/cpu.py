"""Run megatron-core on a machine without CUDA by redirecting its hard-coded CUDA calls to the CPU.

megatron-core asks `torch.cuda` for devices, streams and random states, and accepts parameters by the name of their
CUDA tensor type. `install()` redirects exactly those calls, so that the very same training code runs on gloo.
Covered: tensor, pipeline and data parallelism, sequence parallelism, distributed optimizer, dist_checkpointing.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_INT = -1, -3, 2**31 - 1  # malloc.h
FACTORIES = ("tensor", "empty", "zeros", "ones", "empty_like", "zeros_like")

_tensor_type = torch.Tensor.type


def install() -> None:
    """Redirect the calls, once; do nothing where a CUDA device exists. Call it before building anything."""
    if torch.cuda.is_available() or torch.Tensor.type is _cuda_type_name:
        return
    _redirect_devices()
    _redirect_factories()
    _redirect_random_state()
    _reuse_freed_memory()


def _reuse_freed_memory() -> None:
    """Let glibc reuse freed memory in the next step instead of returning it to the system.

    A returned page is filled with zeros and mapped again when it is needed: 0.4 ms per MB, 7 % of a small joint step.
    The environment's own settings (MALLOC_*) take precedence; without glibc nothing happens.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_INT)
        mallopt(M_TRIM_THRESHOLD, LARGEST_INT)


def _redirect_devices() -> None:
    # torch.compile looks torch functions up by identity and refuses one object under two names: no sharing.
    stream = SimpleNamespace(wait_stream=lambda other: None, wait_event=lambda event: None)
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.current_stream = lambda device=None: stream
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.type = _cuda_type_name  # type: ignore[method-assign]


def _redirect_factories() -> None:
    # `with torch.device(...)` knows factories by identity and lists them once. It must do so before they are replaced,
    # or models that transformers builds on "meta" would get real buffers.
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a factory so that `torch.zeros(..., device="cuda", pin_memory=True)` returns a plain CPU tensor."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _cuda_type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Return `param.type()` as the optimizers expect it: 'torch.cuda.FloatTensor' and the like."""
    if dtype is not None:
        return _tensor_type(self, dtype, *args, **kwargs)
    name = _tensor_type(self)  # under a TorchFunctionMode this call comes back here: add "cuda" once
    return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)


def _redirect_random_state() -> None:
    # The CPU has one generator: the "CUDA" state that the model-parallel tracker swaps is its state.
    cuda: Any = torch.cuda
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # fork() warns when the CPU state moves inside it; here that is its purpose.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
