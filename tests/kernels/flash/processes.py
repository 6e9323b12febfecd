"""Install the extra `flash` into a folder, and start the processes in which FlashAttention 4 compiles there."""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from launch.simulate.device_kind import KINDS
from launch.simulate.fake_device import fake_cuda_environment
from tests.kernels.flash.table import Outcome

ROOT = Path(__file__).parents[3]
EXTRA = "flash"
TIMEOUT_SECONDS = 3000


def list_requirements() -> list[str]:
    """Return the lines of the extra in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"][EXTRA]


def install(folder: Path) -> Path:
    """Install the extra into `folder`, and nothing that it does not name: torch is the environment's own."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *list_requirements()]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder


def find_search_path(packages: Path) -> list[str]:
    """Return the folders in which Python finds what was installed into `packages`.

    The second is named by a `.pth` file, which Python reads in an environment alone.
    """
    compiler = packages / "nvidia_cutlass_dsl" / "dsl_packages"
    assert compiler.is_dir(), f"no CuTe DSL in {packages}"
    return [str(packages), str(compiler)]


def compile_cases(kind: str, names: Sequence[str], packages: Path) -> list[Outcome]:
    """Compile the named cases for a device kind, in one process; return what became of each."""
    device = KINDS[kind]
    with fake_cuda_environment(device) as environment, tempfile.TemporaryDirectory() as folder:
        output, cubins = Path(folder, "outcomes.jsonl"), Path(folder, "cubins")
        cubins.mkdir()
        environment |= {
            "PYTHONPATH": os.pathsep.join([*find_search_path(packages), str(ROOT)]),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
            # FlashAttention 4's own way to compile for a device that is not there.
            "FLASH_ATTENTION_ARCH": f"sm_{device.architecture}",
            "FLASH_ATTENTION_NUM_SMS": str(device.num_multiprocessors),
            "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0",
            "CUTE_DSL_ARCH": f"sm_{device.architecture}a",
            "CUTE_DSL_KEEP": "cubin",
            "CUTE_DSL_DUMP_DIR": str(cubins),
        }
        command = [sys.executable, "-m", "tests.kernels.flash.compile", kind, str(output), *names]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:4])} fails: {done.stderr.strip()[-3000:]}")
        return [Outcome.from_json(json.loads(line)) for line in output.read_text().splitlines()]
