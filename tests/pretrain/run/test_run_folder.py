"""A run folder belongs to one live run; a file system without locks does not look like another run."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from conf.system.errors import UserError
from pretrain.run.run_folder import lock_run_folder


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with lock_run_folder(tmp_path), pytest.raises(UserError, match=rf"in use .*process {os.getpid()}"):
        lock_run_folder(tmp_path).__enter__()


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch, caplog, error: int) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_run_folder(tmp_path):
        assert "cannot be locked" in caplog.text
