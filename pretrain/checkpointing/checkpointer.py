"""Saving step directories with megatron-core's dist_checkpointing.

A checkpoint is written into `step_NNNNNNNN.partial` and renamed when every rank's part, the manifest and the checksums
are on disk.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException

from conf.system.errors import UserError
from model.checkpoint.layout import (
    CheckpointManifest,
    begin_step,
    partial_directory,
    publish_step,
    run_directory_of,
    save_checkpoint_manifest,
    step_directory,
)
from pretrain.checkpointing.integrity import sum_own_files, summing
from pretrain.checkpointing.late_errors import keep_late_errors, raise_late_error
from pretrain.checkpointing.sharded_state import (
    build_save_strategy,
    build_sharded_state,
    count_bytes,
    gather_parameters,
)
from pretrain.checkpointing.size import SPACE_MARGIN
from pretrain.run.process_group import gather_over_ranks, run_on_every_rank, run_on_first_rank


class SaveError(UserError):
    """A checkpoint that could not be written. Nothing with a final name is left of it, earlier ones are untouched."""


@dataclass(frozen=True)
class SaveReport:
    """A checkpoint that is complete on disk.

    save_seconds: training waited. write_seconds: from its beginning until it was complete. num_bytes: of all tensors.
    """

    step: int
    save_seconds: float
    write_seconds: float
    num_bytes: int


@dataclass
class _Save:
    """A save under way. waited: seconds training has stood still for it so far."""

    final: Path
    manifest: CheckpointManifest
    num_bytes: int = 0
    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0

    @property
    def partial(self) -> Path:
        return partial_directory(self.final)


class Checkpointer:
    """Writes the checkpoints of one run and deletes old ones. All ranks call every method together."""

    def __init__(
        self, run_dir: Path, chunks: list[Any], optimizer: MegatronOptimizer, keep: int, asynchronous: bool
    ) -> None:
        self._run_dir, self._chunks, self._optimizer, self._keep = run_dir, chunks, optimizer, keep
        self._asynchronous = asynchronous
        keep_late_errors()
        self._queue = AsyncCallsQueue(persistent=False)
        self._in_flight: _Save | None = None
        self._reports: list[SaveReport] = []
        self.last_step: int | None = None  # of the newest checkpoint that was completed here, or gone back to
        self.begun_step: int | None = None  # of the newest save, whatever became of it

    def save(self, manifest: CheckpointManifest) -> None:
        """Saves the current weights and optimizer state under manifest.step; returns early if asynchronous.

        A save before is finished by now. Raises: SaveError if the disk cannot hold or cannot take it.
        """
        assert self._in_flight is None, "finish() comes first"
        self.begun_step = manifest.step
        save = _Save(step_directory(self._run_dir, manifest.step), manifest)
        gather_parameters(self._chunks)
        state = build_sharded_state(self._chunks, self._optimizer, is_loading=False)
        with _explained(save), _timed(save):
            _on_first_rank(lambda: begin_step(save.partial))
            save.num_bytes = sum(gather_over_ranks(lambda: count_bytes(state)))
            check_free_space(save.partial, save.num_bytes)
            self._write(state, save)
        if not self._asynchronous:
            self._report(save)

    def _write(self, state: dict[str, Any], save: _Save) -> None:
        requests = []

        def write() -> None:
            request = dist_checkpointing.save(
                state,
                str(save.partial),
                build_save_strategy(),
                async_sharded_save=self._asynchronous,
                async_strategy="mcore",
            )
            requests.append(request)
            if request is None:
                raise_late_error()
                sum_own_files(save.partial, dist.get_rank())

        # Of a failed write megatron-core tells the first rank alone.
        run_on_every_rank(lambda: _first_cause_of(write))
        if self._asynchronous:
            request = requests[0]
            self._queue.schedule_async_request(request._replace(async_fn=summing(request.async_fn, save.partial)))
            self._in_flight = save
        else:
            self._publish(save)

    def poll(self) -> None:
        """Completes an asynchronous save that has been written meanwhile. Raises: SaveError if the disk could not."""
        self._complete(blocking=False)

    def finish(self) -> None:
        """Waits for an asynchronous save. Raises: as poll."""
        self._complete(blocking=True)

    def take_reports(self) -> list[SaveReport]:
        """What was completed since the last call."""
        taken, self._reports = self._reports, []
        return taken

    def _complete(self, blocking: bool) -> None:
        save = self._in_flight
        if save is None:
            return
        try:
            with _explained(save), _timed(save):
                if not self._is_written(blocking):
                    return
                self._publish(save)
        except SaveError:
            self._queue, self._in_flight = AsyncCallsQueue(persistent=False), None
            raise
        self._in_flight = None
        self._report(save)

    def _is_written(self, blocking: bool) -> bool:
        """Whether the background writers of all ranks are done. Raises: OSError on every rank if one has failed."""
        failure: OSError | None = None
        try:
            if not self._queue.maybe_finalize_async_calls(blocking=blocking):
                return False
            raise_late_error()
        except (Exception, CheckpointException) as error:
            failure = OSError(_first_cause(error))
        run_on_every_rank(lambda: _raise(failure))
        return True

    def _publish(self, save: _Save) -> None:
        def publish() -> None:
            save_checkpoint_manifest(save.partial, save.manifest)
            publish_step(save.partial, save.final, self._keep)

        _on_first_rank(publish)

    def _report(self, save: _Save) -> None:
        seconds, self.last_step = time.monotonic() - save.started, save.manifest.step
        self._reports.append(SaveReport(save.manifest.step, save.waited, seconds, save.num_bytes))


def check_free_space(directory: Path, num_bytes: int) -> None:
    """Raises UserError before anything is written if tensors of `num_bytes` do not fit on the disk."""
    needed = int(num_bytes * SPACE_MARGIN)

    def check() -> None:
        free = shutil.disk_usage(directory).free
        if needed > free:
            raise OSError(
                f"{directory.parent} has {free / 1e9:.2f} GB free, it needs {needed / 1e9:.2f} GB: free some space or "
                "lower checkpoint.keep, then give the same command again"
            )

    _on_first_rank(check)


def _on_first_rank(action: Callable[[], None]) -> None:
    """Runs a file operation on rank 0; an error there is raised everywhere."""
    try:
        run_on_first_rank(action)
    except OSError as error:
        raise SaveError(f"cannot write the checkpoint: {error}. Earlier checkpoints are untouched.") from error


@contextmanager
def _timed(save: _Save) -> Iterator[None]:
    started = time.monotonic()
    yield
    save.waited += time.monotonic() - started


@contextmanager
def _explained(save: _Save) -> Iterator[None]:
    """Turns a failed write into one clear message and removes what was half written."""
    try:
        yield
    except (UserError, OSError) as error:
        free = shutil.disk_usage(run_directory_of(save.final)).free
        if dist.get_rank() == 0:
            shutil.rmtree(save.partial, ignore_errors=True)
        if isinstance(error, SaveError):
            raise
        raise SaveError(
            f"cannot write checkpoint {save.final}: {_first_cause(error)} ({free / 1e6:.0f} MB were free). Nothing "
            "half-written is left and earlier checkpoints are untouched; free space or mend the cause, then give the "
            "same command again to resume."
        ) from error


def _first_cause_of(write: Callable[[], None]) -> None:
    """Calls `write`. Raises: OSError with one line, which can be sent to other ranks, for any failure."""
    try:
        write()
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is no Exception
        raise OSError(_first_cause(error)) from error


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _first_cause(error: BaseException) -> str:
    """One line of the first rank's failure."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__
