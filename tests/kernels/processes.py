"""Start the processes that compile and interpret cases, and say why they cannot be started here."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement

from launch.simulate.device_kind import KINDS
from launch.simulate.fake_device import fake_cuda_environment, find_obstacle
from launch.simulate.hooks import MissingHookError
from tests.kernels.compiled import Kernel

ROOT = Path(__file__).parents[2]
SECONDS_PER_CASE = 300  # at most; on a core of its own one takes 1 to 15


@dataclass
class Outcome:
    """What is known of a case: its kernels, or why it does not compile; relative errors where it was interpreted."""

    kernels: list[Kernel] = field(default_factory=list)
    error: str | None = None
    errors: dict[str, float] | None = None
    seconds: float = 0.0


def find_reason_to_skip() -> str | None:
    """Return why no kernels can be compiled here, in one line: no compiler, a build for CPUs, versions not ours."""
    return find_foreign_version() or find_obstacle()


def find_foreign_version() -> str | None:
    """Return which of torch and triton is outside the range that pyproject.toml and torch itself ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for package, lines in (("torch", project["dependencies"]), ("triton", importlib.metadata.requires("torch") or [])):
        asked = [Requirement(line) for line in lines]
        for requirement in asked:
            reason = describe_foreign(requirement) if requirement.name == package else None
            if reason is not None:
                return reason
    return None


def describe_foreign(requirement: Requirement) -> str | None:
    """Return in one line that what is installed is not what is asked for; None where it is, or is missing."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if requirement.specifier.contains(version.partition("+")[0], prereleases=True):
        return None
    return f"{requirement.name} {version} is outside of {requirement.specifier}: its internals were not looked at"


def lower_cases(kind: str, names: Sequence[str], output: Path) -> None:
    """Compile cases for a device kind in a process of its own; output receives what lower.py says."""
    with fake_cuda_environment(KINDS[kind]) as environment:
        _run_module("tests.kernels.lower", [kind, str(output), *names], environment, len(names))


def interpret_cases(source: Path, output: Path, num_cases: int) -> None:
    """Interpret what lower_cases recorded, in a process of its own; output receives what interpret.py says."""
    _run_module("tests.kernels.interpret", [str(source), str(output)], dict(os.environ), num_cases)


def _run_module(module: str, arguments: list[str], environment: dict[str, str], num_cases: int) -> None:
    environment = environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", module, *arguments]
    timeout = SECONDS_PER_CASE * num_cases
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(describe_failure(module, done.stderr))


def describe_failure(module: str, errors: str) -> str:
    """Return what a failed process wrote to stderr: one line for a hook that is gone, else its end."""
    last = errors.strip().splitlines()[-1:] or ["nothing is said"]
    _, is_hook, which = last[0].partition(f"{MissingHookError.__name__}: ")
    return which if is_hook else f"{module} fails: {errors.strip()[-3000:]}"


def try_cases(kind: str, names: Sequence[str], *, interpreted: bool) -> dict[str, Outcome]:
    """Compile the named cases for a device kind, and interpret them; return what is known of each by name."""
    import torch

    with TemporaryDirectory() as folder:
        lowered_path, errors_path = Path(folder, "lowered.pt"), Path(folder, "errors.json")
        lower_cases(kind, names, lowered_path)
        lowered = torch.load(lowered_path, weights_only=False)
        outcomes = {
            name: Outcome(case["kernels"], case["error"], None, case["seconds"]) for name, case in lowered.items()
        }
        if interpreted:
            interpret_cases(lowered_path, errors_path, len(names))
            for name, found in json.loads(errors_path.read_text()).items():
                outcomes[name].errors = found["errors"]
                outcomes[name].seconds += found["seconds"]
    return outcomes


def try_cases_in_parallel(
    kind: str, names: Sequence[str], *, interpreted: bool, num_processes: int = 2
) -> dict[str, Outcome]:
    """Do the same with the names dealt out to several processes."""
    dealt = [list(names[start::num_processes]) for start in range(min(num_processes, len(names)))]
    with ThreadPoolExecutor(len(dealt)) as pool:
        parts = pool.map(lambda part: try_cases(kind, part, interpreted=interpreted), dealt)
        found = {name: outcome for part in parts for name, outcome in part.items()}
    return {name: found[name] for name in names}
