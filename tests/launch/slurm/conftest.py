"""A private Slurm for the tests of this folder; without root they are skipped with the reason."""

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
    """Run a cluster during the tests, and remove every trace of it whatever happens."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the cluster is stopped
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
