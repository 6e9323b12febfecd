"""Pretend that this machine has one CUDA device of a given kind, for tracing, lowering and compiling.

Two halves: a process is started under a stub of the CUDA libraries (`fake_cuda_environment`), and calls `pretend`,
after which torch and triton see the device. Its tensors must be fake (torch's FakeTensorMode): nothing computes there.
"""

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from launch.simulate.device_kind import DeviceKind
from launch.simulate.hooks import find_hook, list_hooks, replace_hook

STUB = Path(__file__).with_name("cuda_stub.c")
LIBRARY = "libcuda.so.1"


def find_obstacle() -> str | None:
    """Return why no device can be pretended on this machine, in one line; None: one can."""
    if torch.version.cuda is None:
        return "torch is a build for CPUs alone, which cannot lower for CUDA: install torch's build for CUDA"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _find_compiler() is None:
        return f"no C compiler for {STUB.name}: install cc, or name one in CC"
    return None


def _find_compiler() -> str | None:
    return shutil.which(os.environ.get("CC") or "cc")


@contextmanager
def fake_cuda_environment(kind: DeviceKind) -> Iterator[dict[str, str]]:
    """Build the stub and yield the environment variables of a process that may call `pretend(kind)`.

    Its compilers work in its own thread, and their caches are deleted at the end with the stub.

    Raises:
        RuntimeError: find_obstacle() says why, or the stub does not compile.
    """
    obstacle = find_obstacle()
    if obstacle is not None:
        raise RuntimeError(obstacle)
    with tempfile.TemporaryDirectory(prefix="fake_cuda_") as folder:
        library = Path(folder) / LIBRARY
        _build_stub(kind, library)
        yield os.environ | {
            "LD_PRELOAD": str(library),
            "LD_LIBRARY_PATH": folder,
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "TORCHINDUCTOR_SHAPE_PADDING": "0",  # inductor measures on the device whether to pad matrices
        }


def _build_stub(kind: DeviceKind, library: Path) -> None:
    headers = Path(str(find_hook("triton:__file__"))).parent / "backends" / "nvidia" / "include"
    definitions = {
        "MAJOR": kind.capability[0],
        "MINOR": kind.capability[1],
        "MULTIPROCESSORS": kind.num_multiprocessors,
        "MEMORY": f"{kind.memory}ul",
        "SHARED_PER_BLOCK": kind.shared_per_block,
    }
    options = ["-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", f"-I{headers}"]
    options += [f"-D{name}={value}" for name, value in definitions.items()]
    done = subprocess.run(
        [str(_find_compiler()), *options, "-o", str(library), str(STUB)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{_find_compiler()} does not compile {STUB.name}: {done.stderr.strip()[-500:]}")


def pretend(kind: DeviceKind) -> None:
    """Give torch, inductor and triton one device of this kind until the process ends.

    Raises:
        MissingHookError: this version of torch or triton lacks something that is replaced.
        RuntimeError: the process was not started in a fake_cuda_environment.
    """
    if LIBRARY not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError("pretend() needs the libraries of fake_cuda_environment: start the process in it")
    for hook, replacement in list_hooks(kind).items():
        replace_hook(hook, replacement)
    find_hook("torch._C:_ensureCUDADeviceGuardSet")()
    find_hook("torch._C:_set_only_lift_cpu_tensors")(True)
