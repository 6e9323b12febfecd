"""A progress bar over the steps of a training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class StepProgress:
    """Shows nothing unless told to; then what is done, a note, and the time past and left."""

    def __init__(self, title: str, console: Console, shown: bool) -> None:
        self._title, self._console, self._shown = title, console, shown
        self._progress: Progress | None = None
        self._task: Any = None

    @contextmanager
    def show(self, total: int, completed: int) -> Iterator[None]:
        """Shows the bar while the block runs."""
        columns = (
            TextColumn(self._title),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, disable=not self._shown, refresh_per_second=2) as self._progress:
            self._task = self._progress.add_task("", total=total, completed=completed, note="")
            yield

    def update(self, completed: int, note: str, total: int | None = None) -> None:
        """Moves the bar, if it is shown. total: where it was not known before."""
        if self._progress is not None:
            self._progress.update(self._task, completed=completed, note=note, total=total)
