"""Exit statuses and messages of all entry files, for whatever the user can fix. Standard library only."""

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

# EXIT_STOPPED (sysexits.h: EX_TEMPFAIL): stopped by a signal after saving; launchers requeue on it.
EXIT_USER_ERROR, EXIT_STOPPED, EXIT_INTERRUPTED = 2, 75, 130
SECONDS_FOR_RANK_0 = 10.0  # longer than ranks drift apart while they import and read files


def exit_status(action: Callable[[], int | None], *, interrupted: str = "", show_traceback: bool = False) -> int:
    """Run `action` and return the exit status of the process.

    The status is what `action` returns (None: 0), EXIT_USER_ERROR after the one message of a UserError, or
    EXIT_INTERRUPTED after Ctrl-C. Other exceptions are defects: they pass through with their traceback.

    interrupted: message after Ctrl-C, on standard error like every message. show_traceback: print one before the
    message of a UserError.
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
    """An argument parser that reports mistakes as everything else does: one message and EXIT_USER_ERROR."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit; argparse calls this."""
        _say_once(UserError(f"{message} (--help shows the options)"))
        sys.exit(EXIT_USER_ERROR)


def count(text: str) -> int:
    """Parse a command-line option that is a number of things, at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small: it must be at least 1")
    return value


def quiet_libraries(*modules: str) -> None:
    """Hide warnings that are meant for the libraries' developers; `python -W default` shows them.

    Call this before the libraries are imported. modules: dotted names of libraries other than megatron-core, submodules
    included. Errors that they log still show.
    """
    if sys.warnoptions:
        return
    for name in ("megatron", *modules):
        warnings.filterwarnings("ignore", module=rf"{re.escape(name)}\b")
    for name in ("megatron", "torch.utils.cpp_extension", *modules):
        logging.getLogger(name).setLevel(logging.ERROR)


def _say_once(error: UserError, show_traceback: bool = False) -> None:
    """Print the message at once on rank 0, and on other ranks only if rank 0 has not ended the job in the meantime."""
    rank = _rank()
    if rank:
        time.sleep(SECONDS_FOR_RANK_0)
    if show_traceback:
        traceback.print_exception(error)
    print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)


def read_world_size() -> int:
    """Return the number of processes that WORLD_SIZE says, 1 without it. Raises: UserError if it is no such number."""
    return read_count("WORLD_SIZE", smallest=1)


def read_count(variable: str, smallest: int) -> int:
    """Return a whole number from the environment, `smallest` if it is not set. Raises: UserError if it is none."""
    text = os.environ.get(variable, str(smallest))
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < smallest:
        raise UserError(
            f"the environment says {variable}={text}, which is no whole number of at least {smallest}: start with "
            f"torchrun, which sets it, or unset {variable}"
        )
    return int(text)


def _rank() -> int:
    """Return the rank that torchrun gave this process; 0 without torchrun, or where it is no number."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0
