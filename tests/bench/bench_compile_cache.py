"""Measure compiling with and without saved kernels: `python -m tests.bench.bench_compile_cache [PROCESSES ...]`.

Each line is a set of new processes that compile rotate_heads for four forms of its inputs, on the CPU, or one that
compiles attention of an 8B rank for an H100 that is not there (tests/kernels):

    cold           with nothing
    saved file     with runtime.compile_cache alone: another machine, or a start after /tmp was emptied
    same machine   torch's own folder is still there, too

Seconds are of the slowest rank, kernels those of all ranks. Inductor's C++ is compiled again where torch's own folder
is empty; binaries of Triton's kernels, which a GPU run has instead, are in the file.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.simulate.device_kind import KINDS
from launch.simulate.fake_device import fake_cuda_environment
from tests.helpers.processes import ROOT, compile_on_ranks
from tests.kernels.processes import find_reason_to_skip

PLACES = {"cold": "first", "saved file": "second", "same machine": "second"}  # whose folder of torch's is used
CASE = "attention/joint/8b_tp4"


def main() -> None:
    """Print the table."""
    print(f"{'processes':>9}  {'kernels':<14}{'compiled':>9}{'loaded':>8}{'seconds':>9}{'file MB':>9}")
    for num_ranks in map(int, sys.argv[1:] or ("1", "4")):
        with tempfile.TemporaryDirectory() as name:
            measure(num_ranks, Path(name))
    reason = find_reason_to_skip()
    print(f"{CASE} for H100{'' if reason is None else f': skipped, {reason}'}")
    if reason is None:
        with tempfile.TemporaryDirectory() as name:
            measure_on_cuda(Path(name))


def measure(num_ranks: int, folder: Path) -> None:
    """Print one line per place."""
    for label, local in PLACES.items():
        notes = compile_on_ranks(num_ranks, "rotation", folder / label, folder / "saved", folder / local)
        print_line(label, notes, folder / "saved")


def measure_on_cuda(folder: Path) -> None:
    """Print one line per place for a process that compiles for a pretended device."""
    for label, local in PLACES.items():
        with fake_cuda_environment(KINDS["h100"]) as environment:
            del environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"]
            environment |= {
                "TORCHINDUCTOR_CACHE_DIR": f"{folder}/{local}",
                "TRITON_CACHE_DIR": f"{folder}/{local}/triton",
            }
            command = [sys.executable, "-m", "tests.helpers.compile_on_cuda", CASE, f"{folder}/saved/h100.kernels"]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-8000:]
        print_line(label, [json.loads(done.stdout.splitlines()[-1])], folder / "saved")


def print_line(label: str, notes: list[dict[str, Any]], saved: Path) -> None:
    """Print what the processes of a set noted, and the size of what they saved."""
    compiled, loaded = (sum(note[key] for note in notes) for key in ("compiled", "loaded"))
    seconds, size = max(note["seconds"] for note in notes), sum(path.stat().st_size for path in saved.iterdir()) / 1e6
    print(f"{len(notes):>9}  {label:<14}{compiled:>9}{loaded:>8}{seconds:>9.1f}{size:>9.1f}", flush=True)


if __name__ == "__main__":
    main()
