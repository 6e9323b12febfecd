"""Share tasks among worker processes.

Not a multiprocessing pool: that would import the caller's main module (and with it torch or Hydra) into every worker,
and would wait forever for a worker that was killed.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

from conf.system.errors import UserError
from data_pipeline.prepare.shards import Advance, Done, Failed, Job, TokenizeTask

ROOT = Path(__file__).resolve().parents[2]
STOP_SECONDS = 5.0
# One thread per process, as there is one process per core. Without torch, `datasets` starts faster.
WORKER_ENVIRONMENT = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "USE_TORCH": "0",
}


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


class WorkerPool:
    """Runs up to `num_workers` processes that do the tasks of one job. A context manager, which ends all of them."""

    def __init__(self, job: Job, num_workers: int) -> None:
        self._job = job
        self._num_workers = num_workers
        self._workers: dict[Connection, subprocess.Popen] = {}

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        for connection in self._workers:
            connection.close()
        for process in self._workers.values():
            if exception[0] is not None:
                process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            process.kill()
            process.wait()

    def run(self, tasks: Sequence[TokenizeTask], on_advance: Callable[[Advance], None]) -> None:
        """Do the tasks; they are started in their order.

        on_advance: is called with every report of a worker; what it raises ends all work.
        Raises UserError of the first task that fails, or if a worker dies.
        """
        waiting = iter(tasks)
        running: set[Connection] = set()
        self._start(min(self._num_workers, len(tasks)))
        for connection in self._workers:
            self._give(connection, waiting, running)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                message = self._receive(connection)
                if isinstance(message, Advance):
                    on_advance(message)
                    continue
                running.remove(connection)
                self._give(connection, waiting, running)

    def _give(self, connection: Connection, waiting: Iterator[TokenizeTask], running: set[Connection]) -> None:
        """Send the next task, if there is one."""
        for task in waiting:
            if not _send(connection, task):
                raise self._death(connection)
            running.add(connection)
            return

    def _receive(self, connection: Connection) -> Advance | Done:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            raise self._death(connection) from None
        if not isinstance(message, Failed):
            return message
        if message.is_user_error:
            raise UserError(message.message)
        raise RuntimeError(f"a worker process failed:\n{message.message}")

    def _death(self, connection: Connection) -> UserError:
        process = self._workers[connection]
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        return UserError(
            f"worker process {process.pid} died (exit status {process.returncode}; -9 is often a lack of memory, then "
            "lower data.prepare.workers): the same command continues"
        )

    def _start(self, count: int) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | WORKER_ENVIRONMENT | {"PYTHONPATH": path}
        for _ in range(count - len(self._workers)):
            ours, theirs = Pipe()
            with theirs:
                # A process group of its own: Ctrl-C reaches the parent alone, which ends the workers.
                process = subprocess.Popen(
                    [sys.executable, "-m", "data_pipeline.prepare.worker", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    process_group=0,
                )
            self._workers[ours] = process
            _send(ours, self._job)  # a worker that died at once is noticed when it is given a task


def _send(connection: Connection, message: Job | TokenizeTask) -> bool:
    """Send the message and return whether the process at the other end lives.

    The error of a dead one must not become the context of another: its traceback holds the pickled message, a view of
    a BytesIO, and Python 3.12 dies of a segmentation fault when such a pair is collected as part of a cycle.
    """
    try:
        connection.send(message)
    except OSError:
        return False
    return True
