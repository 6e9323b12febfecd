"""What the entry files share: one message and an exit status for whatever the user can mend. Standard library only."""

import argparse
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from conf.system.errors import UserError

# EXIT_STOPPED (sysexits.h: EX_TEMPFAIL): told to stop, saved, and to be started again; what launchers requeue on.
EXIT_USER_ERROR, EXIT_STOPPED, EXIT_INTERRUPTED = 2, 75, 130
SECONDS_FOR_RANK_0 = 10.0  # longer than ranks drift apart while they import and read files


def exit_status(action: Callable[[], int | None], *, interrupted: str = "", show_traceback: bool = False) -> int:
    """Run `action` and give the exit status of the process.

    The status is what `action` returns (None: 0), EXIT_USER_ERROR after the one message of a UserError, or
    EXIT_INTERRUPTED after Ctrl-C. Other exceptions are defects: they pass through with their traceback.

    interrupted: said after Ctrl-C, on standard error as every message. show_traceback: before a UserError's message.
    """
    try:
        return action() or 0
    except UserError as error:
        _say_once(error, show_traceback)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        if interrupted and not _rank():
            print(interrupted, file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED


class OneLineParser(argparse.ArgumentParser):
    """A command line whose mistakes are told as everything else is: one message, EXIT_USER_ERROR."""

    def error(self, message: str) -> NoReturn:
        _say_once(UserError(f"{message} (--help shows the options)"))
        sys.exit(EXIT_USER_ERROR)


def count(text: str) -> int:
    """Type of a command-line option: a number of things, at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small: it must be at least 1")
    return value


def quiet_libraries(*modules: str) -> None:
    """Hide what libraries tell their own developers, on every rank, of choices made here; `python -W default` shows it.

    To be called before they are imported. modules: dotted names of what is quieted beside megatron-core, with all
    modules inside; of log messages, errors still show.
    """
    if sys.warnoptions:
        return
    for name in ("megatron", *modules):
        warnings.filterwarnings("ignore", module=rf"{re.escape(name)}\b")
    for name in ("megatron", "torch.utils.cpp_extension", *modules):
        logging.getLogger(name).setLevel(logging.ERROR)


def _say_once(error: UserError, show_traceback: bool = False) -> None:
    """Rank 0 prints at once; another rank only if rank 0 has not ended the job in the meantime."""
    rank = _rank()
    if rank:
        time.sleep(SECONDS_FOR_RANK_0)
    if show_traceback:
        traceback.print_exception(error)
    print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)


def _rank() -> int:
    """What torchrun gave this process; 0 outside of it."""
    return int(os.environ.get("RANK", "0"))
