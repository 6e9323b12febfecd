"""Worker: runs each job of a JSON file with a disk that is full for one file of one rank, while one step is saved.

A job is {"overrides": [...], "rank": r, "step": s, "place": p}; p names who writes:
writer     the rank's tensors (a process of its own where saves are asynchronous)
metadata   torch's .metadata, on rank 0, after everything else
config     megatron-core's metadata.json, on rank 0, after that
manifest   our checkpoint.json, on rank 0, last
Needs no small disk, so it runs without root; what is injected is the error that a full disk gives.
"""

import errno
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tests.helpers.worker import take_jobs, train_or_tell

TIMEOUT = timedelta(seconds=60)  # of collectives: ranks that do not meet fail here


def main() -> None:
    """Run the jobs of argv[1] in order; an error that a user would see goes to <run.dir>/error_rank<r>.txt."""
    fault: dict[str, Any] = {}
    break_disk(fault)
    for job in take_jobs(TIMEOUT):
        fault.clear()
        fault.update(job)
        train_or_tell(job["overrides"])


def break_disk(fault: dict[str, Any]) -> None:
    """Make the functions that write fail where the job `fault` asks for it."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from pretrain.checkpointing import checkpointer as checkpoint

    def breaking(place: str, write: Callable[..., Any]) -> Callable[..., Any]:
        def broken(*arguments: Any, **options: Any) -> Any:
            words = repr((arguments, options)) if place == "writer" else repr([*arguments, _directory(arguments)])
            is_here = fault.get("place") == place and fault["rank"] == int(os.environ["RANK"])
            if is_here and f"step_{fault['step']:08d}.partial" in words:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(*arguments, **options)

        return broken

    serialization.save_config = breaking("config", serialization.save_config)
    checkpoint.save_checkpoint_manifest = breaking("manifest", checkpoint.save_checkpoint_manifest)
    writer: Any = FileSystemWriterAsync
    writer.finish = breaking("metadata", writer.finish)
    write_bucket = writer.write_preloaded_data

    def write_preloaded_data(*arguments: Any, **options: Any) -> Any:
        try:
            file_name = options["write_bucket"][0]
            breaking("writer", lambda name: None)(str(file_name))
        except OSError as error:
            return _as_megatron_does(error, options)
        return write_bucket(*arguments, **options)

    writer.write_preloaded_data = staticmethod(write_preloaded_data)


def _directory(arguments: tuple[Any, ...]) -> str:
    return str(getattr(arguments[0], "checkpoint_dir", ""))


def _as_megatron_does(error: OSError, options: dict[str, Any]) -> Any:
    """Return what write_preloaded_data returns when its file cannot be written."""
    outcome = (options["local_proc_idx"], error)
    if options["results_queue"] is not None:
        options["results_queue"].put(outcome)
    if options["count_queue"] is not None:
        options["count_queue"].get()
        options["count_queue"].task_done()
    return outcome


if __name__ == "__main__":
    main()
