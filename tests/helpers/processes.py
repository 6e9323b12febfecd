"""Real processes for distributed tests: torchrun with gloo on this machine."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

OF_A_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ROOT = Path(__file__).resolve().parents[2]


def rank_environment() -> dict[str, str]:
    """Return an environment of one thread per rank: two with two each on two cores are 20 to 50 times slower.

    Nothing of a process group that a test began in its own process.
    """
    others = {name: value for name, value in os.environ.items() if name not in OF_A_GROUP}
    return {**others, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def torchrun(num_ranks: int, module: str, *arguments: str) -> list[str]:
    """Return the command line that starts `module` on `num_ranks` local ranks with a free port."""
    launcher = [sys.executable, "-u", "-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}"]
    return [*launcher, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", module, *arguments]


def run_ranks(num_ranks: int, module: str, *arguments: str, timeout: float = 240, **variables: str) -> None:
    """Run a module to its end. variables: of its environment.

    A failure or a hang raises AssertionError with the output and leaves no process running.
    """
    command = torchrun(num_ranks, module, *arguments)
    pipe, merged = subprocess.PIPE, subprocess.STDOUT
    environment = rank_environment() | variables
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=pipe, stderr=merged, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            output = process.communicate()[0] + f"\nstopped after {timeout} s"
    assert process.returncode == 0, f"{' '.join(command)} failed:\n{output[-8000:]}"


def kill_tree(pid: int) -> None:
    """Send SIGKILL to a process and all its descendants, wherever they moved."""
    try:
        children = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def train_many(
    num_ranks: int,
    jobs: list[list[str]],
    directory: Path,
    worker: str = "tests.helpers.train_jobs",
    timeout: float = 240,
) -> None:
    """Train several runs (a list of overrides each), one after another in one set of processes."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "jobs.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    run_ranks(num_ranks, worker, str(path), timeout=timeout)


def compile_on_ranks(num_ranks: int, function: str, notes: Path, cache: Path, local: Path) -> list[dict[str, Any]]:
    """Run tests/helpers/compile_jobs.py and return its notes by rank. local: torch's own cache folder."""
    notes.mkdir(parents=True)
    words = ("tests.helpers.compile_jobs", str(notes), str(cache), function)
    if num_ranks == 1:  # without the seconds that torchrun takes to start
        environment = rank_environment() | {"TORCHINDUCTOR_CACHE_DIR": str(local)}
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-8000:]
    else:
        run_ranks(num_ranks, *words, TORCHINDUCTOR_CACHE_DIR=str(local))
    files = [notes / f"compiled_rank{rank}.json" for rank in range(num_ranks)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def kill_when(condition: str, run_dir: Path, num_ranks: int, module: str, arguments: list[str]) -> None:
    """Start a command and kill all its processes (SIGKILL) once `run_dir` shows `condition`."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        torchrun(num_ranks, module, *arguments), env=rank_environment(), cwd=ROOT, stdout=quiet, stderr=quiet
    )
    deadline = time.monotonic() + 200
    try:
        while not list(run_dir.glob(condition)):
            assert process.poll() is None, f"the run ended before {condition} appeared"
            assert time.monotonic() < deadline, f"{condition} never appeared"
            time.sleep(0.002)
    finally:
        kill_tree(process.pid)
        process.wait()


def load_lines(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Load the metrics lines of one kind."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]
