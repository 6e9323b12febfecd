"""The CUDA devices of this machine. Run as a module it lists them as JSON, so that no context stays in the caller."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from launch.preflight.findings import Finding, failed, ok, warning
from launch.preflight.subject import GpuFacts, Subject

SECONDS = 300
BUSY_SHARE = 0.05  # of a device's memory in use; more is another process's, not the driver's
WITHOUT_GPUS = "none is on this machine: run this on a GPU node to check devices, kernels and a dry batch"


def check_devices(subject: Subject) -> Iterator[Finding]:
    """As many as the job wants per node, with nobody else on them."""
    if subject.is_cpu_run:
        yield ok(f"runtime.device=cpu: {subject.gpus_per_node} processes per node on {os.cpu_count()} cores here")
        return
    subject.gpus = list_gpus()
    if not subject.gpus:
        yield warning(f"CUDA devices: {WITHOUT_GPUS}")
        return
    yield from _check_number(subject)
    for number, gpu in enumerate(subject.gpus):
        used = gpu.total_bytes - gpu.free_bytes
        if used > BUSY_SHARE * gpu.total_bytes:
            yield warning(
                f"device {number} ({gpu.name}): {used / 1e9:.1f} of {gpu.total_bytes / 1e9:.1f} GB are in use; see "
                "with nvidia-smi who else is on it"
            )


def _check_number(subject: Subject) -> Iterator[Finding]:
    here, wanted = len(subject.gpus), subject.gpus_per_node
    names = ", ".join(sorted({f"{gpu.name}, {gpu.total_bytes / 1e9:.0f} GB" for gpu in subject.gpus}))
    if here < wanted:
        yield failed(f"{here} CUDA devices here ({names}), {wanted} per node are wanted: give --gpus-per-node={here}")
    else:
        yield ok(f"{here} CUDA devices here ({names}), {wanted} per node are wanted")


def count_gpus_quickly() -> int:
    """Devices this process may use, by their names alone: without torch, and so without a wait."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    here = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return here if visible is None else min(here, len([name for name in visible.split(",") if name.strip()]))


def list_gpus() -> list[GpuFacts]:
    """What torch sees, asked in a process of its own. Raises RuntimeError with its last words if that fails."""
    if not count_gpus_quickly():
        return []
    command = [sys.executable, "-m", "launch.preflight.devices"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")
    return [GpuFacts(**values) for values in json.loads(done.stdout)]


def main() -> None:
    """Prints the devices."""
    import torch

    numbers = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    memory = [torch.cuda.mem_get_info(number) for number in numbers]
    gpus = [
        GpuFacts(torch.cuda.get_device_name(number), total, free)
        for number, (free, total) in zip(numbers, memory, strict=True)
    ]
    print(json.dumps([asdict(gpu) for gpu in gpus]))


if __name__ == "__main__":
    main()
