"""Progress of a conversion: an interface that ignores everything, and the bar that the command line shows."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Receives the progress of a conversion and ignores it. Each byte counts twice: written, then read back."""

    def start(self, total_bytes: int) -> None:
        """All checks have passed and `total_bytes` are about to be moved."""

    def advance(self, what: str, num_bytes: int) -> None:
        """One more tensor is done. what: `writing` or `checking`."""


class ConversionBar(Progress):
    """Shows a progress bar in bytes."""

    def __init__(self, bar: RichProgress) -> None:
        self._bar, self._task = bar, bar.add_task("checking the source", total=None)

    def start(self, total_bytes: int) -> None:
        """Set the length of the bar."""
        self._bar.update(self._task, total=total_bytes)

    def advance(self, what: str, num_bytes: int) -> None:
        """Advance the bar."""
        self._bar.update(self._task, description=what, advance=num_bytes)


@contextmanager
def show_progress(console: Console) -> Iterator[Progress]:
    """Show a progress bar within the block."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with RichProgress(*columns, TimeRemainingColumn(), console=console, refresh_per_second=2) as bar:
        yield ConversionBar(bar)
