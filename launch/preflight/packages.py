"""Versions of packages against pyproject.toml."""

import os
from collections.abc import Iterator
from importlib.metadata import version

from launch.check_environment import find_problems, read_requirements
from launch.preflight.findings import Finding, failed, ok
from launch.preflight.subject import Subject

NAMED = ("torch", "megatron-core", "transformers")


def check_packages(subject: Subject) -> Iterator[Finding]:
    """One row per package that is absent, damaged or of another version than the pinned one."""
    # NVIDIA's container brings a torch of its own, as launch/setup.sh knows too.
    without = ["torch"] if "NVIDIA_PYTORCH_VERSION" in os.environ else []
    problems = find_problems(read_requirements([], without))
    for problem in problems:
        yield failed(f"{problem}: run `make setup`")
    if not problems:
        yield ok(", ".join(f"{name} {version(name)}" for name in NAMED))
