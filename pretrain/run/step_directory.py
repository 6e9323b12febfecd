"""Checkpoints appear whole or not at all, and every rank knows which: step directories written in agreement.

A checkpoint is written into `step_NNNNNNNN.partial` and renamed when every rank's part, the manifest and the checksums
are on disk. Only rank 0 creates, renames and removes folders, and only when no rank writes into them any more.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from conf.system.errors import UserError
from model.checkpoint.layout import begin_step, partial_directory, publish_step, run_directory_of, step_directory
from pretrain.run.process_group import run_on_every_rank, run_on_first_rank


class SaveError(UserError):
    """A checkpoint that could not be written. Nothing with a final name is left of it, earlier ones are untouched."""


@dataclass(frozen=True)
class StepDirectory:
    """Writes one checkpoint: begin, write, publish, each within `explained`. All ranks call every method together.

    final: path of the complete checkpoint. keep: how many of the run's newest checkpoints stay.
    """

    final: Path
    keep: int

    @classmethod
    def of_step(cls, run_dir: Path, step: int, keep: int) -> "StepDirectory":
        """Name the directory of the checkpoint after `step` optimizer steps."""
        return cls(step_directory(run_dir, step), keep)

    @property
    def partial(self) -> Path:
        """Path under which it is written."""
        return partial_directory(self.final)

    def begin(self) -> None:
        """Create an empty partial directory; what killed saves have left is removed."""
        run_on_first_rank(lambda: begin_step(self.partial))

    def write(self, action: Callable[[], object]) -> None:
        """Run `action`, which writes this rank's part, on every rank. Raises: OSError on all if it fails on one."""
        run_on_every_rank(lambda: _with_first_cause(action))

    def publish(self, write_manifest: Callable[[Path], object]) -> None:
        """Complete the checkpoint and delete the oldest ones. write_manifest: writes its last file, on rank 0."""

        def publish() -> None:
            write_manifest(self.partial)
            publish_step(self.partial, self.final, self.keep)

        run_on_first_rank(publish)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn an error that every rank has met in the block into a SaveError, and remove what is half written."""
        try:
            yield
        except (UserError, OSError) as error:
            room = _describe_room(run_directory_of(self.final))
            if dist.get_rank() == 0:
                shutil.rmtree(self.partial, ignore_errors=True)
            if isinstance(error, SaveError):
                raise
            raise SaveError(
                f"cannot write checkpoint {self.final}: {find_first_cause(error)}{room}. Nothing half-written is left "
                "and earlier checkpoints are untouched; free space or fix the cause, then give the same command again "
                "to resume."
            ) from error


class DeferredErrors:
    """Keeps errors of writes after which a library goes on to a collective, until every rank can hear of them.

    An error that left such a place would take this rank to another collective than its peers': all would hang.
    """

    def __init__(self) -> None:
        self._errors: list[Exception] = []

    def deferring(
        self, write: Callable[..., Any], errors: tuple[type[Exception], ...] = (OSError,)
    ) -> Callable[..., Any]:
        """Return `write` with these errors kept instead of raised."""

        def defer(*arguments: Any, **options: Any) -> Any:
            try:
                return write(*arguments, **options)
            except errors as error:
                self._errors.append(error)

        return defer

    def raise_first(self) -> None:
        """Raise the first error since the last call, if there was one."""
        errors = self._errors.copy()
        self._errors.clear()
        if errors:
            raise errors[0]


def find_first_cause(error: BaseException) -> str:
    """Return one line of the first rank's failure."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _with_first_cause(write: Callable[[], object]) -> None:
    """Call `write`. Raises: OSError with one line, which can be sent to other ranks, for any failure."""
    try:
        write()
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is no Exception
        raise OSError(find_first_cause(error)) from error


def _describe_room(directory: Path) -> str:
    """Return a remark on the free space; none if the folder is gone, which must not hide why saving failed.

    It is rounded, for ranks look at different moments and say the same.
    """
    try:
        return f" (about {shutil.disk_usage(directory).free / 1e9:.0f} GB were free)"
    except OSError:
        return ""
