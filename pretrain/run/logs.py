"""Where log lines of our own modules go: rank 0's console (around the progress bar) and train.log of the run folder."""

import logging
import os
import sys
from pathlib import Path

from rich.console import Console

LOG_FILE = "train.log"
OUR_PACKAGES = ("model", "pretrain", "data_pipeline", "lora")


class ConsoleHandler(logging.Handler):
    """Prints the message alone, without breaking lines or the progress bar below it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        self._console.print(record.getMessage(), soft_wrap=True, markup=False, highlight=False)


def start_console_logging() -> None:
    """Before the run folder may be written: what takes long while the data are opened, from the first process."""
    if os.environ.get("RANK", "0") == "0":
        _handle_with([ConsoleHandler(Console(file=sys.stderr))], logging.INFO)


def start_logging(run_dir: Path, console: Console, is_first: bool) -> None:
    """INFO and above on rank 0, warnings on the others. Starting again replaces the former handlers."""
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
