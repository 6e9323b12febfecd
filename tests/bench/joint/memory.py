"""Peak memory of a step above weights and gradient buffers, each side in a process of its own.

`python -m tests.bench.joint.memory SIDE LENGTH VOCAB_SIZE LOSS_CHUNK_ROWS [recompute]` prints {"resident", "live"} in
bytes: growth of the resident size, and the most bytes of tensors alive at a time (tests/helpers/live_bytes.py).
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.schema import Recompute
from tests.bench.joint.cases import RUNTIME, Case
from tests.helpers.processes import rank_environment


def measure_memory(case: Case, side: str, recompute: bool = False) -> dict[str, int]:
    """Return {"resident", "live"} of the second step, in bytes."""
    sizes = map(str, (case.sequence_length, case.vocab_size, case.runtime.loss_chunk_rows))
    arguments = [side, *sizes, *(["recompute"] if recompute else [])]
    # What is freed goes back at once, so that the peak is what is in use and not what the allocator keeps.
    environment = rank_environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.bench.joint.memory", *arguments]
    pipe = subprocess.PIPE
    finished = subprocess.run(command, check=True, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment)
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    """Run the measured process."""
    from tests.bench.joint.sides import build_side, trainer_session

    name, length, vocab_size, loss_chunk_rows, *rest = sys.argv[1:]
    runtime = replace(RUNTIME, loss_chunk_rows=int(loss_chunk_rows))
    recompute = Recompute.full if rest else Recompute.none
    with trainer_session():
        side = build_side(Case(int(length), int(vocab_size), runtime=runtime, recompute=recompute), name)
        for _ in range(2):
            side.clear()
            resident = _measure_resident(side)
        side.clear()
        print(json.dumps({"resident": resident, "live": _measure_live(side)}))


def _measure_resident(side: Any) -> int:
    """Return the growth of the resident size in a step: the kernel's own peak, set back before it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_bytes("VmRSS")
    side.run()
    return _status_bytes("VmHWM") - before


def _measure_live(side: Any) -> int:
    from tests.helpers.live_bytes import LiveBytes

    with LiveBytes([*side.module.parameters(), *side.gradients().values()]) as live:
        side.run()
    return live.peak


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    main()
