"""Errors of what megatron-core writes on rank 0 when all tensors are written, kept until every rank can hear of them.

The other ranks wait in a collective while it writes `.metadata` and `metadata.json`. An error that left that place, on
a disk that has just become full, would take rank 0 to another collective than theirs: all would hang.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

_kept: list[OSError] = []
_installed = False


def keep_late_errors() -> None:
    """From now on those writes keep their OSError for `raise_late_error`; to be called before the first save."""
    global _installed
    if not _installed:
        _installed = True
        writer: Any = FileSystemWriterAsync
        writer.finish = _keeping(writer.finish)
        serialization.save_config = _keeping(serialization.save_config)


def raise_late_error() -> None:
    """Raises: the first OSError that was kept since the last call."""
    errors = _kept.copy()
    _kept.clear()
    if errors:
        raise errors[0]


def _keeping(write: Callable[..., Any]) -> Callable[..., Any]:
    def keep(*arguments: Any, **options: Any) -> Any:
        try:
            return write(*arguments, **options)
        except OSError as error:
            _kept.append(error)

    return keep
