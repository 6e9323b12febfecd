"""Worker: trains drafters that end with an error, and writes down what each rank's user would see.

A job is {"overrides": [...]}, with "rank" and "step" where that rank's disk is full while that step is saved. The
message goes to <run.dir>/error_rank<r>.txt, the time at which it came to time_rank<r>.txt.
"""

import errno
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.helpers.worker import take_jobs

TIMEOUT = timedelta(seconds=60)  # of collectives: ranks that do not meet fail here


def main() -> None:
    """Run the jobs of argv[1] in order."""
    from conf.composition.compose import compose_drafter_config
    from conf.system.errors import UserError
    from lora.drafter.build import run_drafter

    fault: dict[str, Any] = {}
    fill_disk(fault)
    rank = os.environ["RANK"]
    for job in take_jobs(TIMEOUT):
        fault.clear()
        fault.update(job)
        config = compose_drafter_config(job["overrides"])
        run_dir = Path(config.run.dir)
        try:
            run_drafter(config)
        except UserError as error:
            (run_dir / f"error_rank{rank}.txt").write_text(str(error), encoding="utf-8")
            (run_dir / f"time_rank{rank}.txt").write_text(str(time.time()), encoding="utf-8")


def fill_disk(fault: dict[str, Any]) -> None:
    """Make DeepSpeed's writes fail half-way where `fault`, a job, says so."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    write = TorchCheckpointEngine.save

    def save(self: Any, state_dict: Any, path: str) -> None:
        if fault.get("rank") == int(os.environ["RANK"]) and f"step_{fault['step']:08d}.partial" in path:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, state_dict, path)

    TorchCheckpointEngine.save = save


if __name__ == "__main__":
    main()
