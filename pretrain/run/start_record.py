"""Records every start in `starts/<NNN>/`, so that each part of a long run can be explained and repeated.

config.yaml        resolved configuration
environment.json   host, time, ranks, devices, package versions, variables of Slurm, NCCL and torch
code.json          commit of the code, and whether it had changes; code.diff holds them
changes.txt        what differs from the configuration that wrote the checkpoint it continues
"""

import json
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from conf.system.atomic import atomic_directory
from conf.system.errors import UserError
from pretrain.run.run_folder import CONFIG_FILE, STARTS_FOLDER, write_out

_CODE = Path(__file__).parents[2]
_VARIABLES = re.compile(r"(SLURM|NCCL|TORCH|UCX|CUDA|OMP|NVTE)_\w+|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|MASTER_\w+")
_SECRETS = re.compile(r"JWT|TOKEN|KEY|SECRET|PASS")
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "datasets", "numpy", "triton")


def record_start(config: Any, run_dir: Path, world_size: int, changes: Iterable[str]) -> Path:
    """Write the record of this start and return its folder. Raises: UserError if the run folder cannot be written."""
    folder = run_dir / STARTS_FOLDER
    known = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()]
    directory = folder / f"{max(known, default=-1) + 1:03d}"
    try:
        with atomic_directory(directory) as partial:
            _write(partial / CONFIG_FILE, write_out(config))
            _write(partial / "environment.json", json.dumps(_describe_environment(world_size), indent=2) + "\n")
            commit, diff = _describe_code()
            _write(partial / "code.json", json.dumps({"commit": commit, "dirty": bool(diff)}) + "\n")
            _write(partial / "code.diff", diff)
            _write(partial / "changes.txt", "".join(line + "\n" for line in changes))
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be written: {error}") from error
    return directory


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _describe_environment(world_size: int) -> dict[str, Any]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "command": sys.argv,
        "python": platform.python_version(),
        "world_size": world_size,
        "devices": [torch.cuda.get_device_name(index) for index in range(count)],
        "packages": {name: version(name) for name in _PACKAGES if _is_installed(name)},
        "variables": {name: os.environ[name] for name in sorted(os.environ) if _is_recorded(name)},
    }


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _is_recorded(variable: str) -> bool:
    return bool(_VARIABLES.fullmatch(variable)) and not _SECRETS.search(variable)


def _describe_code() -> tuple[str | None, str]:
    """Return commit and uncommitted changes of the repository this file lies in; (None, "") for an installed copy."""
    commit = _git("rev-parse", "HEAD")
    return (commit.strip() or None) if commit else None, _git("diff", "HEAD") or ""


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_CODE), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
