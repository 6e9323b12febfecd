"""Measure compiling with and without saved kernels: `python -m tests.bench.bench_compile_cache [PROCESSES ...]`.

Each line is a set of new processes that compile rotate_heads for four forms of its inputs, on the CPU:

    cold           with nothing
    saved file     with runtime.compile_cache alone: another machine, or a start after /tmp was emptied
    same machine   torch's own folder is still there, too

Seconds are of the slowest rank, kernels those of all ranks. Inductor's C++ is compiled again where torch's own folder
is empty; binaries of Triton's kernels, which a GPU run has instead, are in the file.
"""

import sys
import tempfile
from pathlib import Path

from tests.helpers.processes import compile_on_ranks

PLACES = {"cold": "first", "saved file": "second", "same machine": "second"}  # whose folder of torch's is used


def main() -> None:
    """Print the table."""
    print(f"{'processes':>9}  {'kernels':<14}{'compiled':>9}{'loaded':>8}{'seconds':>9}{'file MB':>9}")
    for num_ranks in map(int, sys.argv[1:] or ("1", "4")):
        with tempfile.TemporaryDirectory() as name:
            measure(num_ranks, Path(name))


def measure(num_ranks: int, folder: Path) -> None:
    """Print one line per place."""
    for label, local in PLACES.items():
        notes = compile_on_ranks(num_ranks, "rotation", folder / label, folder / "saved", folder / local)
        compiled, loaded = (sum(note[key] for note in notes) for key in ("compiled", "loaded"))
        seconds = max(note["seconds"] for note in notes)
        size = sum(path.stat().st_size for path in (folder / "saved").iterdir()) / 1e6
        print(f"{num_ranks:>9}  {label:<14}{compiled:>9}{loaded:>8}{seconds:>9.1f}{size:>9.1f}", flush=True)


if __name__ == "__main__":
    main()
