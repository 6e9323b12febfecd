"""Saves and loads checkpoints of a run with megatron-core's dist_checkpointing, in the background if configured."""

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

from conf.schema import CheckpointConfig
from model.checkpoint.layout import CheckpointManifest, save_checkpoint_manifest, step_of
from pretrain.checkpointing.sharded_state import (
    build_save_strategy,
    build_sharded_state,
    count_bytes,
    defer_late_errors,
    gather_parameters,
    load_checkpoint,
    raise_late_error,
    sum_own_files,
    summing,
)
from pretrain.costs import SPACE_MARGIN
from pretrain.run.process_group import gather_over_ranks, run_on_every_rank, run_on_first_rank
from pretrain.run.run_status import TrainState
from pretrain.run.step_directory import SaveError, StepDirectory, find_first_cause


@dataclass(frozen=True)
class SaveReport:
    """Describes a checkpoint that is complete on disk.

    save_seconds: training waited. write_seconds: from its beginning until it was complete. num_bytes: of all tensors.
    """

    step: int
    save_seconds: float
    write_seconds: float
    num_bytes: int


@dataclass
class _Save:
    """Follows a save under way. waited: seconds training has stood still for it so far."""

    directory: StepDirectory
    manifest: CheckpointManifest
    num_bytes: int = 0
    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0


class Checkpointer:
    """Writes and reads the checkpoints of one run, and deletes old ones. All ranks call every method together."""

    def __init__(
        self,
        run_dir: Path,
        chunks: list[Any],
        optimizer: MegatronOptimizer,
        config: CheckpointConfig,
        build_manifest: Callable[[TrainState, dict[str, Any]], CheckpointManifest],
    ) -> None:
        self._run_dir, self._chunks, self._optimizer = run_dir, chunks, optimizer
        self._keep, self._asynchronous = config.keep, config.asynchronous
        self._build_manifest = build_manifest
        defer_late_errors()
        self._queue = AsyncCallsQueue(persistent=False)
        self._in_flight: _Save | None = None
        self._reports: list[SaveReport] = []
        self.last_step: int | None = None  # of the newest checkpoint that was completed or read here

    def save(self, state: TrainState, guard: dict[str, Any]) -> None:
        """Save the current weights and optimizer state of this moment; return early if asynchronous.

        A save before is finished by now. guard: what the loss guard remembers.
        Raises: SaveError if the disk cannot hold or cannot take it.
        """
        assert self._in_flight is None, "finish() comes first"
        directory = StepDirectory.of_step(self._run_dir, state.step, self._keep)
        save = _Save(directory, self._build_manifest(state, guard))
        gather_parameters(self._chunks)
        tensors = build_sharded_state(self._chunks, self._optimizer, is_loading=False)
        with save.directory.explained(), _timed(save):
            save.directory.begin()
            save.num_bytes = sum(gather_over_ranks(lambda: count_bytes(tensors)))
            check_free_space(save.directory.partial, save.num_bytes)
            self._write(tensors, save)
        if not self._asynchronous:
            self._report(save)

    def _write(self, tensors: dict[str, Any], save: _Save) -> None:
        requests, partial = [], save.directory.partial

        def write() -> None:
            request = dist_checkpointing.save(
                tensors,
                str(partial),
                build_save_strategy(),
                async_sharded_save=self._asynchronous,
                async_strategy="mcore",
            )
            requests.append(request)
            if request is None:
                raise_late_error()
                sum_own_files(partial, dist.get_rank())

        save.directory.write(write)  # of a failed write megatron-core tells the first rank alone
        if self._asynchronous:
            request = requests[0]
            self._queue.schedule_async_request(request._replace(async_fn=summing(request.async_fn, partial)))
            self._in_flight = save
        else:
            self._publish(save)

    def load(self, step_dir: Path) -> None:
        """Read weights and optimizer state of a step directory, which then counts as the newest checkpoint."""
        load_checkpoint(step_dir, self._chunks, self._optimizer)
        self.last_step = step_of(step_dir)

    def poll(self) -> None:
        """Complete an asynchronous save that has been written meanwhile. Raises: SaveError if the disk failed."""
        self._complete(blocking=False)

    def finish(self) -> None:
        """Wait for an asynchronous save. Raises: as poll."""
        self._complete(blocking=True)

    def take_reports(self) -> list[SaveReport]:
        """Return what was completed since the last call."""
        taken, self._reports = self._reports, []
        return taken

    def _complete(self, blocking: bool) -> None:
        save = self._in_flight
        if save is None:
            return
        try:
            with save.directory.explained(), _timed(save):
                if not self._is_written(blocking):
                    return
                self._publish(save)
        except SaveError:
            self._queue, self._in_flight = AsyncCallsQueue(persistent=False), None
            raise
        self._in_flight = None
        self._report(save)

    def _is_written(self, blocking: bool) -> bool:
        """Return whether the background writers of all ranks are done. Raises: OSError on every rank if one failed."""
        failure: OSError | None = None
        try:
            if not self._queue.maybe_finalize_async_calls(blocking=blocking):
                return False
            raise_late_error()
        except (Exception, CheckpointException) as error:
            failure = OSError(find_first_cause(error))
        run_on_every_rank(lambda: _raise(failure))
        return True

    def _publish(self, save: _Save) -> None:
        save.directory.publish(lambda partial: save_checkpoint_manifest(partial, save.manifest))

    def _report(self, save: _Save) -> None:
        seconds, self.last_step = time.monotonic() - save.started, save.manifest.step
        self._reports.append(SaveReport(save.manifest.step, save.waited, seconds, save.num_bytes))


def check_free_space(directory: Path, num_bytes: int) -> None:
    """Raise SaveError before anything is written if tensors of `num_bytes` do not fit on the disk."""
    needed = int(num_bytes * SPACE_MARGIN)

    def check() -> None:
        free = shutil.disk_usage(directory).free
        if needed > free:
            raise SaveError(
                f"cannot write the checkpoint: {directory.parent} has {free / 1e9:.2f} GB free, it needs "
                f"{needed / 1e9:.2f} GB: free some space or lower checkpoint.keep, then give the same command again. "
                "Earlier checkpoints are untouched."
            )

    run_on_first_rank(check)


@contextmanager
def _timed(save: _Save) -> Iterator[None]:
    started = time.monotonic()
    yield
    save.waited += time.monotonic() - started


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
