"""Act as a rank without torch: `python -m tests.helpers.fake_rank FOLDER PLAN...`, one word of PLAN per rank.

exit:N      exit with status N
kill:N      die by signal N
wait:N      write FOLDER/ready_<r>, wait for a signal, write its name to FOLDER/signal_<r>, exit with status N
"""

import os
import signal
import sys
import time
from pathlib import Path

SECONDS_AT_MOST = 60


def main() -> None:
    """Do what this rank's word of the plan asks."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    kind, number = sys.argv[2 + rank].split(":")
    where = ", to a terminal" if sys.stdout.isatty() else ""
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} speaking{where}", flush=True)
    if kind == "kill":
        os.kill(os.getpid(), int(number))
    if kind == "wait":
        _wait(folder, rank)
    sys.exit(int(number))


def _wait(folder: Path, rank: int) -> None:
    received: list[int] = []
    for stop in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(stop, lambda given, frame: received.append(given))
    (folder / f"ready_{rank}").touch()
    deadline = time.monotonic() + SECONDS_AT_MOST
    while not received and time.monotonic() < deadline:
        time.sleep(0.02)
    (folder / f"signal_{rank}").write_text(signal.Signals(received[0]).name if received else "none")


if __name__ == "__main__":
    main()
