"""Run torchrun so that ranks can save before they stop: `python -m launch.torchrun [torchrun options] -m MODULE ...`.

Options and agent are torchrun's. Three things differ:
- SIGTERM, SIGUSR1 and SIGINT go to the ranks, which finish their step, save and exit in their own time; torchrun itself
  would kill them 30 seconds later.
- The exit status is the ranks' own (0 complete, 2 user error, 75 start again, 130 interrupted, otherwise 1) without
  torchrun's table; after a crash one line names the rank that ended first.
- With LOG_DIR in the environment every rank's output is appended to LOG_DIR/rank_<r>.log; rank 0's is also shown.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from types import FrameType

from conf.system.entry import EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER_ERROR
from launch.tee import tee_output

STOP_STATUS: dict[int, int] = {
    signal.SIGTERM: EXIT_STOPPED,
    signal.SIGUSR1: EXIT_STOPPED,
    signal.SIGINT: EXIT_INTERRUPTED,
}
RANK_SCRIPT = Path(__file__).with_name("rank.sh")
EXIT_CRASHED = 1
ONE_NODE = ("1", "1:1")
# These loggers announce how the agent ends processes; this module prints one line instead.
CHATTY_LOGGERS = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")
SECONDS_FOR_OTHER_NODES = 10.0
SECONDS_ALONE = 60.0  # that a host whose ranks have ended waits for the others


def main() -> None:
    """Start the ranks and exit with their status."""
    for number in STOP_STATUS:
        signal.signal(number, _forward)
    from torch.distributed.run import get_args_parser  # takes seconds; signals are handled by now

    parser = get_args_parser()
    parser.prog = "python -m launch.torchrun"
    arguments = parser.parse_args()
    if not arguments.module:
        parser.error("give the module to run: -m MODULE [arguments]")
    words = [arguments.training_script, *arguments.training_script_args]
    with tee_output(_console_log(arguments.nnodes, words)):
        status = run_ranks(arguments)
    sys.exit(status)


def run_ranks(arguments: argparse.Namespace) -> int:
    """Start the ranks, wait for them and return their status. arguments: parsed by torchrun's parser."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import run

    arguments.training_script_args = [arguments.training_script, *arguments.training_script_args]
    arguments.training_script, arguments.module, arguments.no_python = str(RANK_SCRIPT), False, True
    arguments.signals_to_handle = "SIGQUIT"  # this module handles the others
    os.environ["PYTHON"] = sys.executable
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if arguments.nnodes not in ONE_NODE:
        threading.Thread(target=_give_up_alone, daemon=True).start()
    try:
        run(arguments)
    except ChildFailedError as error:
        exits = sort_exits({rank: (each.exitcode, each.timestamp) for rank, each in error.failures.items()})
        status = choose_status(list(exits.values()))
        if status == EXIT_CRASHED:
            print(f"error: {describe_crash(exits)}", file=sys.stderr, flush=True)
        if arguments.nnodes not in ONE_NODE:
            # The error keeps the agent alive: other hosts need its store until their ranks have ended.
            time.sleep(SECONDS_FOR_OTHER_NODES)
        return status
    except RendezvousError as error:
        reason = error.__cause__ or error
        print(f"error: the hosts of this run have not met, or lost each other: {reason}", file=sys.stderr, flush=True)
        return EXIT_CRASHED
    return 0


def _give_up_alone() -> None:
    """End this process some time after its ranks have ended.

    On a host that is cut off, torchrun's agent would ask the others for minutes what to do.
    """
    last_seen: float | None = None
    while last_seen is None or time.monotonic() - last_seen < SECONDS_ALONE:
        time.sleep(1)
        if find_children(os.getpid()):
            last_seen = time.monotonic()
    where = f"; output of its ranks: {os.environ['LOG_DIR']}" if os.environ.get("LOG_DIR") else ""
    message = f"the ranks on {socket.gethostname()} have ended and the other hosts do not respond{where}"
    print(f"error: {message}. When they can be reached, the same command continues", file=sys.stderr, flush=True)
    time.sleep(1)  # the console is copied by a thread
    os._exit(EXIT_CRASHED)


def sort_exits(failures: dict[int, tuple[int, int]]) -> dict[int, int]:
    """Sort ranks by their likelihood of being the cause, and return rank to exit code.

    A rank that is killed breaks its peers' connections, and they may end in the same moment with a status of their own.

    Args:
        failures: Rank to exit code and time in seconds.
    """
    first = min(seconds for _, seconds in failures.values())

    def order(rank: int) -> tuple[bool, bool]:
        code, seconds = failures[rank]
        return seconds > first + 1, code >= 0 or -code in STOP_STATUS

    return {rank: failures[rank][0] for rank in sorted(failures, key=order)}


def choose_status(exits: list[int]) -> int:
    """Choose one exit status for all ranks.

    The agent ends all ranks after the first one, so only the first decides between crashed and stopped. A user error or
    Ctrl-C is never a consequence, so it counts for any rank.

    Args:
        exits: Exit codes of the ranks that failed, the first one first; negative: killed by that signal.
    """
    statuses = [STOP_STATUS.get(-code, code) if code < 0 else code for code in exits]
    for status in (EXIT_USER_ERROR, EXIT_INTERRUPTED):
        if status in statuses:
            return status
    return EXIT_STOPPED if statuses[0] == EXIT_STOPPED else EXIT_CRASHED


def describe_crash(exits: dict[int, int]) -> str:
    """Name the rank that ended first, how, and its log. exits: rank to exit code, the first one first."""
    rank, code = next(iter(exits.items()))
    how = f"with status {code}" if code >= 0 else f"by signal {signal.Signals(-code).name}"
    folder = os.environ.get("LOG_DIR")
    where = f"; its output: {folder}/rank_{rank}.log" if folder else ""
    return f"rank {rank} on {socket.gethostname()} ended {how}, and the others with it{where}"


def find_children(pid: int) -> list[int]:
    """Return the processes whose parent is `pid`, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def _forward(number: int, frame: FrameType | None) -> None:
    """Pass a signal on to every rank of this node; before there are any, end this process."""
    ranks = find_children(os.getpid())
    if not ranks:
        sys.exit(STOP_STATUS[number])
    for pid in ranks:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _console_log(nnodes: str, words: list[str]) -> Path | None:
    """Return the file that this console is copied to: rank 0's log, or with several hosts a file of this one."""
    if not os.environ.get("LOG_DIR"):
        return None
    name = "rank_0.log" if nnodes in ONE_NODE else f"console_{socket.gethostname()}.log"
    path = Path(os.environ["LOG_DIR"]) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"== {datetime.now():%F %T} {socket.gethostname()}: {' '.join(words)}\n")
    return path


if __name__ == "__main__":
    main()
