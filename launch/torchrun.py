"""torchrun for runs that save when they are told to stop: `python -m launch.torchrun [torchrun options] -m MODULE ...`.

The same options, the same agent. Three things differ:
- SIGTERM, SIGUSR1 and SIGINT go to the ranks, which finish their step, save and exit in their own time; torchrun itself
  would kill them 30 seconds later.
- The ranks' exit status is handed on (0 complete, 2 user error, 75 start me again, 130 interrupted, else 1) without
  torchrun's table; of a crash, one line per rank that went first.
- With LOG_DIR in the environment every rank's output is appended to LOG_DIR/rank_<r>.log; rank 0's is shown, too.
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
# The agent announces how it ends processes; what matters of that is told here, in one line.
CHATTY = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")
SECONDS_FOR_OTHER_NODES = 10.0
SECONDS_ALONE = 60.0  # without ranks, before a host gives up on hearing from the others


def main() -> None:
    """Exit with the ranks' status."""
    for number in STOP_STATUS:
        signal.signal(number, _forward)
    from torch.distributed.run import get_args_parser  # seconds; a signal is understood by now

    parser = get_args_parser()
    parser.prog = "python -m launch.torchrun"
    arguments = parser.parse_args()
    if not arguments.module:
        parser.error("name what to run as a module: -m MODULE [arguments]")
    words = [arguments.training_script, *arguments.training_script_args]
    with tee_output(_console_log(arguments.nnodes, words)):
        status = run_ranks(arguments)
    sys.exit(status)


def run_ranks(arguments: argparse.Namespace) -> int:
    """Start the ranks, wait for them and return their status. arguments: what torchrun's parser made."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import run

    arguments.training_script_args = [arguments.training_script, *arguments.training_script_args]
    arguments.training_script, arguments.module, arguments.no_python = str(RANK_SCRIPT), False, True
    arguments.signals_to_handle = "SIGQUIT"  # the others are handled here
    os.environ["PYTHON"] = sys.executable
    for name in CHATTY:
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
            # Here, where the error still holds the agent: the others' need its store until their ranks have ended.
            time.sleep(SECONDS_FOR_OTHER_NODES)
        return status
    except RendezvousError as error:
        reason = error.__cause__ or error
        print(f"error: the hosts of this run have not met, or lost each other: {reason}", file=sys.stderr, flush=True)
        return EXIT_CRASHED
    return 0


def _give_up_alone() -> None:
    """Ends this process when its ranks have ended and it does not: on a host that is cut off, torchrun's agent asks the
    others for minutes what to do."""
    last_seen: float | None = None
    while last_seen is None or time.monotonic() - last_seen < SECONDS_ALONE:
        time.sleep(1)
        if find_children(os.getpid()):
            last_seen = time.monotonic()
    where = f"; output of its ranks: {os.environ['LOG_DIR']}" if os.environ.get("LOG_DIR") else ""
    message = f"the ranks on {socket.gethostname()} have ended and the other hosts do not answer{where}"
    print(f"error: {message}. When they can be reached, the same command continues", file=sys.stderr, flush=True)
    time.sleep(1)  # the console is copied by a thread
    os._exit(EXIT_CRASHED)


def sort_exits(failures: dict[int, tuple[int, int]]) -> dict[int, int]:
    """Rank to exit code, the cause first. failures: rank to exit code and time in seconds.

    A rank that is killed breaks its peers' connections: they may be noticed in the same moment, with a status.
    """
    first = min(seconds for _, seconds in failures.values())

    def order(rank: int) -> tuple[bool, bool]:
        code, seconds = failures[rank]
        return seconds > first + 1, code >= 0 or -code in STOP_STATUS

    return {rank: failures[rank][0] for rank in sorted(failures, key=order)}


def choose_status(exits: list[int]) -> int:
    """One status for all ranks. exits: of those that failed, the first one first; negative: killed by that signal.

    Only the first one counts as a crash or as stopped: the agent ends the rest. A user error and Ctrl-C are nobody's
    consequence, they count wherever they are.
    """
    statuses = [STOP_STATUS.get(-code, code) if code < 0 else code for code in exits]
    for status in (EXIT_USER_ERROR, EXIT_INTERRUPTED):
        if status in statuses:
            return status
    return EXIT_STOPPED if statuses[0] == EXIT_STOPPED else EXIT_CRASHED


def describe_crash(exits: dict[int, int]) -> str:
    """The rank that ended first, how, and where it says more. exits: rank to exit code, the first one first."""
    rank, code = next(iter(exits.items()))
    how = f"with status {code}" if code >= 0 else f"by signal {signal.Signals(-code).name}"
    folder = os.environ.get("LOG_DIR")
    where = f"; its output: {folder}/rank_{rank}.log" if folder else ""
    return f"rank {rank} on {socket.gethostname()} ended {how}, and the others with it{where}"


def find_children(pid: int) -> list[int]:
    """Processes whose parent is `pid`, from /proc."""
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
    """To every rank of this node; before there are any, this process ends instead."""
    ranks = find_children(os.getpid())
    if not ranks:
        sys.exit(STOP_STATUS[number])
    for pid in ranks:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _console_log(nnodes: str, words: list[str]) -> Path | None:
    """Where this console is copied to: rank 0's log, or, where it may be another node's, one of this host."""
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
