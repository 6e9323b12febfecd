"""Check this machine's environment: package versions, CUDA devices, and the kernels the run would use."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from conf.schema import AttentionBackend
from conf.system.entry import quiet_libraries
from launch.check_environment import find_problems, read_requirements
from launch.preflight.runner import Finding, Gpu, TrainingJob

NAMED_PACKAGES = ("torch", "megatron-core", "transformers")  # whose versions are printed
LISTING_SECONDS = 300
BUSY_SHARE = 0.05  # of a device's memory in use; more belongs to another process, not to the driver
WITHOUT_GPUS = "this machine has none: run this on a GPU node to check devices, kernels and a dry batch"
ATTENTION_KERNELS = {
    AttentionBackend.flex: "FlexAttention with a block mask",
    AttentionBackend.cpu: "dense matmuls over the parts of the mask",
}


def check_package_versions(job: TrainingJob) -> Iterator[Finding]:
    """Compare installed packages with pyproject.toml; one finding per missing, damaged or wrongly versioned one."""
    # NVIDIA's container brings its own torch, as launch/setup.sh knows too.
    without = ["torch"] if "NVIDIA_PYTORCH_VERSION" in os.environ else []
    problems = find_problems(read_requirements([], without))
    for problem in problems:
        yield Finding.failed(f"{problem}: run `make setup`")
    if not problems:
        yield Finding.ok(", ".join(f"{name} {version(name)}" for name in NAMED_PACKAGES))


def check_devices(job: TrainingJob) -> Iterator[Finding]:
    """Check that there are as many CUDA devices as the job wants per node, with nobody else on them."""
    if job.is_cpu_run:
        yield Finding.ok(f"runtime.device=cpu: {job.gpus_per_node} processes per node on {os.cpu_count()} cores here")
        return
    job.gpus = list_gpus()
    if not job.gpus:
        yield Finding.warning(f"CUDA devices: {WITHOUT_GPUS}")
        return
    yield _check_number(job)
    for number, gpu in enumerate(job.gpus):
        used = gpu.total_bytes - gpu.free_bytes
        if used > BUSY_SHARE * gpu.total_bytes:
            yield Finding.warning(
                f"device {number} ({gpu.name}): {used / 1e9:.1f} of {gpu.total_bytes / 1e9:.1f} GB are in use; "
                "nvidia-smi shows who else uses it"
            )


def _check_number(job: TrainingJob) -> Finding:
    here, wanted = len(job.gpus), job.gpus_per_node
    names = ", ".join(sorted({f"{gpu.name}, {gpu.total_bytes / 1e9:.0f} GB" for gpu in job.gpus}))
    if here < wanted:
        return Finding.failed(
            f"{here} CUDA devices here ({names}), {wanted} per node are wanted: give --gpus-per-node={here}"
        )
    return Finding.ok(f"{here} CUDA devices here ({names}), {wanted} per node are wanted")


def count_gpus_quickly() -> int:
    """Count the devices this process may use by their device files, without the wait of importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    here = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return here if visible is None else min(here, len([name for name in visible.split(",") if name.strip()]))


def list_gpus() -> list[Gpu]:
    """Return the devices that torch sees.

    A process of its own asks, so that no CUDA context stays in this one.

    Raises:
        RuntimeError: The process failed; the message is its last line.
    """
    if not count_gpus_quickly():
        return []
    command = [sys.executable, "-c", f"from {__name__} import print_gpus; print_gpus()"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LISTING_SECONDS)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")
    return [Gpu(**values) for values in json.loads(done.stdout)]


def print_gpus() -> None:
    """Print the devices that torch sees as JSON."""
    import torch

    numbers = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    memory = [torch.cuda.mem_get_info(number) for number in numbers]
    gpus = [
        Gpu(torch.cuda.get_device_name(number), total, free)
        for number, (free, total) in zip(numbers, memory, strict=True)
    ]
    print(json.dumps([asdict(gpu) for gpu in gpus]))


def check_kernels(job: TrainingJob) -> Iterator[Finding]:
    """Report the trainer's choice of layers, weight gradients and attention, made on this machine.

    Kernels slower than a GPU could have are warnings. Raises UserError if the configuration asks for something this
    machine lacks.
    """
    quiet_libraries()
    import torch

    from model.megatron.kernel_choice import (
        check_machine,
        check_packages,
        choose_gradient_accumulation_fusion,
        choose_transformer_engine,
    )

    has_cuda = torch.cuda.is_available()
    if not has_cuda and not job.is_cpu_run:
        check_packages(job.config.parallel, job.config.precision)  # the nodes have this environment
        yield Finding.warning(
            f"unknown without a CUDA device. With one: {_describe_packages()}; attention: "
            f"{_describe_backend(_guess_backend(job))}"
        )
        return
    check_machine(job.config.parallel, job.config.precision)
    used, reason = choose_transformer_engine()
    yield _judge(f"layers: {'Transformer Engine' if used else 'megatron-core'} ({reason})", used or not has_cuda)
    used, reason = choose_gradient_accumulation_fusion()
    remedy = "" if used or not has_cuda else "; launch/README.md, GPU set-up, says where to get it"
    yield _judge(f"fused weight gradients: {'on' if used else 'off'} ({reason}){remedy}", used or not has_cuda)
    yield Finding.ok(_describe_attention(job))


def _describe_packages() -> str:
    """Say which layers and gradients the packages here would give a machine with devices."""
    from model.megatron.kernel_choice import APEX_EXTENSION

    found = {name: importlib.util.find_spec(name) is not None for name in ("transformer_engine", APEX_EXTENSION)}
    layers = (
        "Transformer Engine" if found["transformer_engine"] else "megatron-core (transformer_engine is not installed)"
    )
    fused = "on" if any(found.values()) else f"off (neither transformer_engine nor {APEX_EXTENSION} is installed)"
    return f"layers: {layers}; fused weight gradients: {fused}"


def _judge(detail: str, is_best: bool) -> Finding:
    return Finding.ok(detail) if is_best else Finding.warning(detail)


def _describe_attention(job: TrainingJob) -> str:
    """Name the attention backend. Raises UserError for a backend or device that this machine cannot provide."""
    from model.attention.plan import PlanBuilder
    from model.megatron.transformer_config import TORCH_DTYPES
    from pretrain.run.process_group import choose_device

    config = job.config
    device, asked = choose_device(config.runtime.device), config.runtime.attention_backend
    plans = PlanBuilder(config.model, asked, TORCH_DTYPES[config.precision.dtype], device)
    return (
        f"attention: {_describe_backend(plans.backend)} (runtime.attention_backend={asked.value}, device "
        f"{device.type}); the flash-attention package is not used"
    )


def _guess_backend(job: TrainingJob) -> AttentionBackend:
    """Return the backend that a CUDA device would get."""
    asked = job.config.runtime.attention_backend
    return AttentionBackend.flex if asked is AttentionBackend.auto else asked


def _describe_backend(backend: AttentionBackend) -> str:
    return f"{backend.value}, {ATTENTION_KERNELS[backend]}"
