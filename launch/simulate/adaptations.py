"""List what of torch and megatron-core is replaced so that one rank of a job runs alone, on fake tensors.

Names are `module:name.name` (hooks.py). Tried with torch 2.13.0 and megatron-core as pinned.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from launch.simulate.attention import StandInAttention
from launch.simulate.hooks import find_hook, replace_hook
from model.attention.visibility import VisibleKeys

TYPE_NAMES = {torch.bfloat16: "BFloat16", torch.float16: "Half", torch.float32: "Float"}


def adapt_to_one_rank(add_flops: Callable[[int], None]) -> None:
    """Replace all of it until the process ends. add_flops: counts those of attention.

    Raises:
        MissingHookError: this version of torch or megatron-core lacks something that is replaced.
    """
    adapt_to_fake_tensors()
    for hook, replacement in _list_peers().items():
        replace_hook(hook, replacement)
    remember_attended_pairs()
    replace_hook("model.attention.plan:build_flex_attention", lambda keys: build_stand_in(keys, add_flops))


def adapt_to_fake_tensors() -> None:
    """Replace what does not concern other ranks. Raises: as adapt_to_one_rank."""
    for hook, replacement in {**_list_device(), **_list_tensors()}.items():
        replace_hook(hook, replacement)
    find_hook("torch.optim.optimizer:_foreach_supported_types").append(FakeTensor)


def _list_peers() -> dict[str, Any]:
    """List what other ranks would answer, or what torch's fake process group lacks."""
    return {
        "torch.distributed:all_gather_object": _gather_own,
        "torch.distributed:broadcast_object_list": lambda *_, **__: None,
        "torch.distributed:new_group": _on_fake_backend(find_hook("torch.distributed:new_group")),
        # The fake group has no coalesced collectives: each is called, and counted, by itself.
        "megatron.core.distributed.param_and_grad_buffer:_coalescing_manager": _one_by_one,
    }


def _list_device() -> dict[str, Any]:
    """List what is asked of the device beside operators."""
    return {
        "torch.cuda:Event": _Event,
        "torch.cuda:Stream": lambda *_, **__: _Stream(),
        "torch.cuda:stream": _on_stream,
        "torch.cuda:current_stream": lambda device=None: _Stream(),
        "torch.cuda:manual_seed": lambda seed: None,
        "torch.cuda:manual_seed_all": lambda seed: None,
        "torch.cuda:set_device": lambda device: None,
        "torch.cuda:empty_cache": lambda: None,
        # Nothing in the model is random, and there is no generator on the device.
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state": lambda *_, **__: torch.empty(0),
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state": lambda *_, **__: None,
        "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.add": lambda self, name, seed: None,
        "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork": _fork,
    }


def _list_tensors() -> dict[str, Any]:
    """List what fake tensors do otherwise than tensors of a device."""
    type_of = torch.Tensor.type

    def name_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self.device.type == "cpu":
            return type_of(self, *args, **kwargs)
        return f"torch.cuda.{TYPE_NAMES.get(self.dtype, self.dtype)}Tensor"

    return {
        "torch._subclasses.fake_tensor:FakeTensor.type": name_type,
        # torch's own asks for every element by itself.
        "torch._subclasses.fake_tensor:FakeTensor.tolist": lambda self: self.to("cpu").tolist(),
        # torch's own swaps the tensors of parameters, which a fake one refuses.
        "torch.nn:Module._apply": _apply,
    }


def _apply(self: torch.nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """Convert a module's tensors; its parameters become new ones with the same attributes."""
    for child in self.children():
        child._apply(convert)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            converted = torch.nn.Parameter(convert(parameter.detach()), requires_grad=parameter.requires_grad)
            vars(converted).update(vars(parameter))
            self._parameters[name] = converted
    for name, buffer in self._buffers.items():
        self._buffers[name] = None if buffer is None else convert(buffer)
    return self


def remember_attended_pairs() -> None:
    """Count attended pairs while the intervals of keys are on the CPU; on the device their numbers are gone."""
    move = find_hook("model.attention.visibility:VisibleKeys.to")

    def count_and_move(keys: VisibleKeys, device: torch.device) -> VisibleKeys:
        moved = move(keys, device)
        vars(moved)["attended_pairs"] = int(keys.count().sum())
        return moved

    replace_hook("model.attention.visibility:VisibleKeys.to", count_and_move)


def build_stand_in(keys: VisibleKeys, add_flops: Callable[[int], None]) -> StandInAttention:
    """Build what stands in for attention under these intervals, whose pairs were counted."""
    return StandInAttention(vars(keys)["attended_pairs"], len(keys.clean_start), add_flops)


def _gather_own(gathered: list[Any], value: Any, group: Any = None) -> None:
    """Let every rank have what this one has."""
    gathered[:] = [value] * len(gathered)


def _on_fake_backend(new_group: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{**kwargs, "backend": "fake", "pg_options": None})

    return make


@contextmanager
def _one_by_one(*_: Any, **__: Any) -> Iterator[Any]:
    yield SimpleNamespace(wait=lambda: None)


@contextmanager
def _on_stream(stream: Any) -> Iterator[None]:
    yield


@contextmanager
def _fork(self: Any, name: str = "") -> Iterator[None]:
    yield


class _Event:
    """An event that is over at once: nothing is timed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Do nothing."""

    def elapsed_time(self, end: Any) -> float:
        """Return no time."""
        return 0.0

    def synchronize(self) -> None:
        """Do nothing."""


class _Stream(SimpleNamespace):
    """The one stream there is."""

    cuda_stream = device_index = stream_id = 0
    device_type = 1

    def wait_stream(self, stream: Any) -> None:
        """Do nothing."""

    def wait_event(self, event: Any) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def record_event(self, event: Any = None) -> Any:
        """Return an event that is over."""
        return event or _Event()
