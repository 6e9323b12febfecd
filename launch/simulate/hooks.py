"""List what of torch, inductor and triton is replaced so that a process believes in a device that is not there.

Names are `module:name.name`. One that a version does not have is named in the error, so that a new torch or triton says
where to look. Tried with torch 2.13.0+cu130 and triton 3.7.1.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from launch.simulate.device_kind import DeviceKind


class MissingHookError(RuntimeError):
    """Says which function of torch or triton, replaced here, this version does not have."""


def find_hook(hook: str) -> Any:
    """Return what `module:name.name` names; raise MissingHookError where it is gone."""
    owner, name = _find_owner(hook)
    return getattr(owner, name)


def replace_hook(hook: str, replacement: Any) -> Any:
    """Set what `module:name.name` names and return what it was; raise MissingHookError where it is gone."""
    owner, name = _find_owner(hook)
    before = vars(owner).get(name, getattr(owner, name))
    setattr(owner, name, replacement)
    return before


def _find_owner(hook: str) -> tuple[Any, str]:
    module, _, path = hook.partition(":")
    try:
        owner = importlib.import_module(module)
        *owners, name = path.split(".")
        for part in owners:
            owner = getattr(owner, part)
        getattr(owner, name)
    except (ImportError, AttributeError) as error:
        versions = ", ".join(f"{package} {_find_version(package)}" for package in ("torch", "triton"))
        raise MissingHookError(f"{hook} is gone in {versions}: {error}") from error
    return owner, name


def _find_version(package: str) -> str:
    return getattr(importlib.import_module(package), "__version__", "?") if importlib.util.find_spec(package) else "-"


def list_hooks(kind: DeviceKind) -> Mapping[str, Any]:
    """Return what is replaced, as `module:name.name`, and by what.

    Every name gets a function of its own: dynamo looks functions up by identity and refuses one under two names.
    """
    return {**_list_torch_hooks(kind), **_list_dynamo_hooks(kind), **_list_compiler_hooks(kind)}


def _list_torch_hooks(kind: DeviceKind) -> dict[str, Any]:
    properties = _describe(kind)
    stream = SimpleNamespace(cuda_stream=0, device_index=0, stream_id=0, device_type=1)
    hooks = {
        "torch._subclasses.fake_tensor:FakeTensorMode.avoid_device_init": property(lambda self: True),
        "torch._subclasses.fake_tensor:init_gpu_context": lambda device: None,
        "torch.accelerator:is_available": lambda: False,  # asked of the driver, which the stub is not
        "torch.cuda:get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    }
    values = {
        "torch._C:_accelerator_getDeviceIndex": 0,
        "torch._C:_cuda_getDevice": 0,
        "torch._C:_cuda_getCurrentRawStream": 0,
        "torch._C:_cuda_getDeviceCount": 1,
        "torch.cuda:is_available": True,
        "torch.cuda:is_initialized": True,
        "torch.cuda:is_bf16_supported": True,
        "torch.cuda:device_count": 1,
        "torch.cuda:current_device": 0,
        "torch.cuda:get_device_name": kind.name,
        "torch.cuda:get_device_properties": properties,
        "torch.cuda:get_device_capability": kind.capability,
        "torch.cuda:current_stream": stream,
        "torch.cuda:set_rng_state": None,
        "torch.cuda:synchronize": None,
        "torch.cuda:_lazy_init": None,
    }
    return hooks | {hook: _constant(value) for hook, value in values.items()}


def _list_dynamo_hooks(kind: DeviceKind) -> dict[str, Any]:
    interface = "torch._dynamo.device_interface:CudaInterface"
    values = {
        "get_compute_capability": kind.architecture,
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_raw_stream": 0,
        "synchronize": None,
        "set_device": None,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "get_device_properties": _describe(kind),
        "Worker.get_device_properties": _describe(kind),
        "Worker.current_device": 0,
    }
    return {f"{interface}.{name}": staticmethod(_constant(value)) for name, value in values.items()}


def _list_compiler_hooks(kind: DeviceKind) -> dict[str, Any]:
    heuristics = "torch._inductor.runtime.triton_heuristics"
    folder = "torch._inductor.fx_passes.joint_graph:UniformValueConstantFolder"
    return {
        **{hook: _fold_on_cpu(find_hook(hook)) for hook in (f"{folder}.run", f"{folder}._add_peephole_patterns")},
        "triton.runtime:driver._active": _build_driver(kind),
        "torch._inductor.runtime.triton_helpers:set_driver_to_gpu": lambda: None,
        # Tracing computes single numbers on the device, in case that it is asked for them.
        "torch.fx.experimental.proxy_tensor:CONSTANT_NUMEL_LIMIT": 0,
        # Compiled kernels are neither loaded nor launched.
        f"{heuristics}:CachingAutotuner._make_launchers": lambda self: None,
        f"{heuristics}:StaticTritonCompileResult.can_statically_launch": staticmethod(_constant(None)),
    }


class _ConstantsOnCpu(TorchDispatchMode):
    """Makes on the CPU what is to be made on a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, options = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, dict(kwargs or {})))
        return func(*args, **options)


def _fold_on_cpu(fold: Callable[..., Any]) -> Callable[..., Any]:
    """Return a pass of inductor that computes constants, which takes one element on the device, for the CPU."""

    def fold_on_cpu(*args: Any, **options: Any) -> Any:
        with _ConstantsOnCpu():
            return fold(*args, **options)

    return fold_on_cpu


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _describe(kind: DeviceKind) -> SimpleNamespace:
    """Return torch's device properties."""
    return SimpleNamespace(
        name=kind.name,
        major=kind.capability[0],
        minor=kind.capability[1],
        total_memory=kind.memory,
        multi_processor_count=kind.num_multiprocessors,
        L2_cache_size=kind.l2_cache,
        warp_size=32,
        regs_per_multiprocessor=kind.registers_per_multiprocessor,
        max_threads_per_multi_processor=kind.threads_per_multiprocessor,
        max_threads_per_block=1024,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=kind.shared_per_block,
        shared_memory_per_multiprocessor=kind.shared_per_multiprocessor,
        is_integrated=0,
        is_multi_gpu_board=0,
        uuid="0",
        pci_bus_id=0,
        pci_device_id=0,
        pci_domain_id=0,
        gcnArchName="",
    )


def _build_driver(kind: DeviceKind) -> SimpleNamespace:
    """Return what triton asks its driver while it compiles."""
    target = find_hook("triton.backends.compiler:GPUTarget")("cuda", kind.architecture, 32)
    device = torch.device("cuda", 0)
    properties = {
        "max_shared_mem": kind.shared_per_block,
        "multiprocessor_count": kind.num_multiprocessors,
        "max_num_regs": kind.registers_per_multiprocessor,
        "warpSize": 32,
    }
    return SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: device,
        get_device_interface=lambda: torch.cuda,
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
    )
