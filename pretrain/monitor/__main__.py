"""Shows where a run stands: `python -m pretrain.monitor RUN [--once] [--png FILE] [--every SECONDS]`."""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live

from conf.system.entry import OneLineParser, exit_status
from conf.system.errors import UserError
from pretrain.monitor.alerts import find_alerts
from pretrain.monitor.folder import check_is_run, view_run_folder
from pretrain.monitor.history import MetricsFollower
from pretrain.monitor.render import render
from pretrain.monitor.summary import summarise

PNG_SECONDS = 60.0  # between two pictures of a run that is watched
WIDTH = 120  # where there is no terminal to ask


def seconds(text: str) -> float:
    """Parse the value of --every."""
    value = float(text)
    if not value >= 0.1:
        raise argparse.ArgumentTypeError(f"{text} is too small: it must be at least 0.1")
    return value


def main() -> None:
    """Exit with status 0, with 2 after one message for a folder that is no run, with 130 after Ctrl-C."""
    parser = OneLineParser(
        prog="python -m pretrain.monitor",
        description="Progress, losses, speed, checkpoints and alerts of a run, live or once. Reads its folder alone.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, such as runs/nld_8b_ar")
    parser.add_argument("--once", action="store_true", help="print the summary once (also where there is no terminal)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the curves too; live, again every minute")
    parser.add_argument("--every", type=seconds, default=5.0, help="seconds between looks (default: %(default)s)")
    arguments = parser.parse_args()
    sys.exit(exit_status(lambda: watch(arguments)))


def watch(arguments: argparse.Namespace) -> None:
    """Show or draw the run until it ends. Raises: UserError for a folder that is no run, or a picture not writable."""
    check_is_run(arguments.run)
    follower = MetricsFollower(arguments.run)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    if arguments.once or not console.is_terminal:
        console.print(look(arguments.run, follower))
        if arguments.png:
            draw(follower, arguments)
            console.print(f"curves: {arguments.png}", soft_wrap=True)
        return
    drawn = float("-inf")
    with Live(look(arguments.run, follower), console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            if arguments.png and time.monotonic() - drawn > PNG_SECONDS:
                draw(follower, arguments)
                drawn = time.monotonic()
            time.sleep(arguments.every)
            live.update(look(arguments.run, follower), refresh=True)


def look(run_dir: Path, follower: MetricsFollower) -> RenderableType:
    """Return the summary of this moment."""
    follower.read()
    now, view = time.time(), view_run_folder(run_dir)
    summary = summarise(view, follower.history, now)
    return render(view, summary, find_alerts(view, follower.history, summary, follower.num_damaged), now)


def draw(follower: MetricsFollower, arguments: argparse.Namespace) -> None:
    """Draw the picture of this moment. Raises: UserError."""
    from pretrain.monitor.plot import draw_run  # matplotlib takes a second

    try:
        draw_run(follower.history, view_run_folder(arguments.run).title, arguments.png)
    except OSError as error:
        raise UserError(f"--png {arguments.png} cannot be written: {error}") from error


if __name__ == "__main__":
    main()
