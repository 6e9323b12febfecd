"""Commands of a benchmark, as users type them, side by side on the cores there are."""

import os
import subprocess
from collections.abc import Sequence


def run_all(commands: Sequence[list[str]], at_once: int = 1) -> None:
    """Run commands in order, `at_once` at a time with one thread each. Raises: SystemExit naming one that failed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    waiting, running = list(commands), []
    while waiting or running:
        while waiting and len(running) < at_once:
            command = waiting.pop(0)
            running.append((command, subprocess.Popen(command, env=environment)))
        command, process = running.pop(0)
        if process.wait():
            for _, other in running:
                other.terminate()
            raise SystemExit(f"failed: {' '.join(command)}")
