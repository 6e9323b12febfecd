"""A Slurm of our own for the tests of this folder; without root they are skipped, saying so."""

import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.slurm_cluster import SlurmCluster, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """Runs while the tests do; whatever happens to them, nothing of it stays."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # or nothing would be taken down
    folder = Path(tempfile.mkdtemp(prefix="slurm_"))  # short: sockets lie in it
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        left = [process.cmdline() for process in cluster.processes()]
        shutil.rmtree(folder, ignore_errors=True)
    assert not left, left
