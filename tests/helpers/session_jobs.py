"""Worker: runs each job of a JSON file inside a RunSession and notes per rank what became of it.

A job is {"run_dir": ..., "action": ..., "rank": r}; outcome_<action>_rank<r>.json beside the run folder says
{"error": class and message or null, "seconds": ..., "found": ...}. Actions:
enter        nothing inside: entering the session is tried
signal       rank r was sent SIGUSR1; found: the signal that is agreed on
write        rank r cannot write its part, while the others take a second to write theirs; found: whether those stayed
manifest     rank 0 cannot write the manifest
metrics      rank 0 cannot open the metrics
"""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.helpers.worker import take_jobs

SLOW = 1.0  # seconds another rank's part takes


def main() -> None:
    """Run the jobs of argv[1] in order."""
    from conf.system.errors import UserError
    from pretrain.run.stop import listen

    listen()
    for job in take_jobs(timedelta(seconds=60)):
        began = time.monotonic()
        outcome: dict[str, Any] = {"error": None, "found": None}
        try:
            outcome["found"] = _run(job)
        except UserError as error:
            outcome["error"] = f"{type(error).__name__}: {error}"
        outcome["seconds"] = time.monotonic() - began
        path = Path(job["run_dir"]).parent / f"outcome_{job['action']}_rank{os.environ['RANK']}.json"
        path.write_text(json.dumps(outcome), encoding="utf-8")


def _run(job: dict[str, Any]) -> Any:
    from conf.schema import Device, RuntimeConfig
    from pretrain.run.session import RunSession

    with RunSession(Path(job["run_dir"]), RuntimeConfig(device=Device.cpu, tensorboard=False)) as session:
        return ACTIONS[job["action"]](session, session.ranks.rank == job["rank"])


def _receive_signal(session: Any, is_mine: bool) -> str:
    from pretrain.run import stop

    with stop.deferred():
        if is_mine:
            os.kill(os.getpid(), signal.SIGUSR1)
        return str(session.agree_on_signal().name)


def _write(session: Any, is_mine: bool) -> bool:
    stayed = True

    def write(partial: Path) -> None:
        nonlocal stayed
        part = partial / f"part_{session.ranks.rank}"
        part.write_text("half")
        if is_mine:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        time.sleep(SLOW)
        stayed = part.read_text() == "half"

    from pretrain.run.step_directory import SaveError

    try:
        session.save_step(2, 2, write, write_manifest)
    except SaveError:
        if not stayed:
            raise AssertionError("a part was deleted while its rank was writing") from None
        raise
    return stayed


def _fail_manifest(session: Any, is_mine: bool) -> None:
    def fail(partial: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    session.save_step(2, 2, lambda partial: (partial / f"part_{session.ranks.rank}").write_text("whole"), fail)


def _save(session: Any, is_mine: bool) -> None:
    session.save_step(
        1, 2, lambda partial: (partial / f"part_{session.ranks.rank}").write_text("whole"), write_manifest
    )


def _open_metrics(session: Any, is_mine: bool) -> None:
    if session.ranks.is_first:
        (session.run_dir / "metrics.jsonl").mkdir()
    session.open_metrics(0, {})


def write_manifest(partial: Path) -> None:
    """Write the manifest, which makes a step directory complete."""
    (partial / "checkpoint.json").write_text("{}")


ACTIONS: dict[str, Callable[[Any, bool], Any]] = {
    "enter": lambda session, is_mine: None,
    "signal": _receive_signal,
    "save": _save,
    "write": _write,
    "manifest": _fail_manifest,
    "metrics": _open_metrics,
}


if __name__ == "__main__":
    main()
