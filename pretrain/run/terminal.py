"""What a person at the terminal sees: log lines of our modules (also in train.log), and a bar over the steps."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_FILE = "train.log"
OUR_PACKAGES = ("model", "pretrain", "data_pipeline", "lora")


class ConsoleHandler(logging.Handler):
    """Prints the message alone, without breaking lines or the progress bar below it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        self._console.print(record.getMessage(), soft_wrap=True, markup=False, highlight=False)


def start_console_logging() -> None:
    """Log on the first process's terminal alone, as long as the run folder may not be written."""
    if os.environ.get("RANK", "0") == "0":
        _handle_with([ConsoleHandler(Console(file=sys.stderr))], logging.INFO)


def start_logging(run_dir: Path, console: Console, is_first: bool) -> None:
    """Log INFO and above on rank 0, there also into train.log, and warnings on the others; replaces former handlers.

    Raises: OSError if train.log cannot be opened.
    """
    # Notices about its own internals and deprecations; what a user can act on comes as an exception.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    handlers: list[logging.Handler] = [ConsoleHandler(console)]
    if is_first:
        handlers.append(logging.FileHandler(run_dir / LOG_FILE))
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    _handle_with(handlers, logging.INFO if is_first else logging.WARNING)


def _handle_with(handlers: list[logging.Handler], level: int) -> None:
    for package in OUR_PACKAGES:
        logger = logging.getLogger(package)
        for former in logger.handlers:
            former.close()
        logger.handlers = handlers
        logger.setLevel(level)
        logger.propagate = False


class ProgressBar:
    """Shows how many of so many steps are done, a note, and the time past and left. shown: False on most ranks."""

    def __init__(self, title: str, console: Console, shown: bool) -> None:
        self._title, self._console, self._shown = title, console, shown
        self._progress: Progress | None = None
        self._task: Any = None

    @contextmanager
    def show(self, total: int, completed: int) -> Iterator[None]:
        """Show the bar while the block runs."""
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
        """Move the bar, if it is shown. total: where it was not known before."""
        if self._progress is not None:
            self._progress.update(self._task, completed=completed, note=note, total=total)


def describe_values(values: Mapping[str, float | int | None], names: Sequence[str]) -> str:
    """Return those of `names` that have a value, with five digits each, for one line of the log."""
    return ", ".join(f"{name} {values[name]:.5g}" for name in names if values[name] is not None)
