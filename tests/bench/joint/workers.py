"""Functions that take turns, each in a process of its own.

In one process the reference, which takes and frees gigabytes, leaves our step pages that cost it up to a tenth of its
time; a trainer runs one of them.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from tests.bench.joint.sides import trainer_session
from tests.bench.timing import cpu_seconds, measure_in_turns
from tests.helpers.processes import OF_A_GROUP

Build = Callable[[], Callable[[], object]]  # must be known by name, or a partial of one


def measure_in_processes(builds: Mapping[str, Build], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of every call of what each builds, as measure_in_turns does.

    Raises RuntimeError if a process fails.
    """
    with ExitStack() as running:
        workers = {name: running.enter_context(_Worker(name, build)) for name, build in builds.items()}
        functions = {name: worker.run for name, worker in workers.items()}
        return measure_in_turns(functions, rounds, clock=lambda run: run())  # type: ignore[arg-type, return-value]


class _Worker:
    """One process, which runs its function on request."""

    def __init__(self, name: str, build: Build) -> None:
        context = get_context("spawn")
        self._name, (self._connection, other) = name, context.Pipe()
        self._process = context.Process(target=_serve, args=(other, build), daemon=True)

    def __enter__(self) -> "_Worker":
        self._process.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.terminate()
        self._process.join()

    def run(self) -> float:
        """Run the function once and return its CPU seconds."""
        self._connection.send("run")
        while not self._connection.poll(1):
            if not self._process.is_alive():
                raise RuntimeError(f"the process of {self._name} ended with status {self._process.exitcode}")
        return self._connection.recv()


def _serve(connection: Connection, build: Build) -> None:
    torch.set_num_threads(1)
    for name in OF_A_GROUP:  # the parent's
        os.environ.pop(name, None)
    with trainer_session():
        function = build()
        while connection.recv():
            connection.send(cpu_seconds(function))
