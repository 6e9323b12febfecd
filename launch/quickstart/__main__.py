"""Run the quickstart: `python -m launch.quickstart [overrides]` or `make quickstart`. story.py tells what it does."""

import argparse
import sys
from pathlib import Path

from conf.system.entry import exit_status
from launch.quickstart.phases import hide_library_messages
from launch.quickstart.story import DRAFTER_PREFIX, run_quickstart

EXIT_CHECK_FAILED = 1


def main() -> None:
    """Parse the command line; exit with 1 if a check fails, with 2 and one message if something cannot run."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.quickstart",
        description="Text, toy checkpoint, AR stage, joint stage, export, draft adapter, decoding in four modes, "
        "instruct tuning, responses to questions, one summary. "
        "A second call continues where the first one stopped.",
    )
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of runs (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier quickstart and start over")
    parser.add_argument(
        "overrides",
        nargs="*",
        help="configuration overrides for all stages, such as train.tokens=1e5; those of the draft adapter begin with "
        f"{DRAFTER_PREFIX}, such as {DRAFTER_PREFIX}train.steps=10",
    )
    arguments = parser.parse_args()
    hide_library_messages()
    sys.exit(
        exit_status(
            lambda: 0 if run_quickstart(arguments.root, arguments.fresh, arguments.overrides) else EXIT_CHECK_FAILED,
            interrupted="interrupted: the same command continues from here",
        )
    )


if __name__ == "__main__":
    main()
