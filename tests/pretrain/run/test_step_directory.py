"""A checkpoint that cannot be written: the message names the cause, whatever else is gone."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from conf.schema import Device
from pretrain.run.process_group import join_process_group
from pretrain.run.step_directory import DeferredErrors, SaveError, StepDirectory


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    """Start a process group of this process alone."""
    with join_process_group(Device.cpu, timeout_minutes=1):
        yield
    assert not dist.is_initialized()


def fail(text: str) -> None:
    raise OSError(text)


def test_a_run_folder_that_is_gone_does_not_hide_why_saving_failed(tmp_path: Path) -> None:
    directory = StepDirectory.of_step(tmp_path / "run", 3, keep=2)
    with pytest.raises(SaveError, match="step_00000003: the real cause") as caught, directory.explained():
        directory.begin()
        shutil.rmtree(tmp_path / "run")
        directory.write(lambda: fail("the real cause"))
    assert "were free" not in str(caught.value)


def test_deferred_errors_are_raised_once_and_the_first_one_counts() -> None:
    errors = DeferredErrors()
    write = errors.deferring(fail)
    write("first")
    write("second")
    with pytest.raises(OSError, match="first"):
        errors.raise_first()
    errors.raise_first()
