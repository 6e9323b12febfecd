"""Run the jobs of a JSON file one after another in one process group; all workers share this.

Everything large is imported inside functions: helper processes of megatron-core's writer import a worker's file again.
"""

import json
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any


def take_jobs(timeout: timedelta | None = None) -> Iterator[Any]:
    """Yield the jobs of argv[1] in order, inside one group of gloo processes: starting one costs seconds.

    timeout: of collectives, so that ranks that do not meet fail.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timeout)
    yield from json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    dist.destroy_process_group()


def train_or_tell(overrides: list[str]) -> None:
    """Train a run; what a user would read of a failure goes to <run.dir>/error_rank<r>.txt."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from conf.composition.compose import compose_run_config
    from conf.system.errors import UserError
    from pretrain.assemble import run_training

    config = compose_run_config(overrides)
    try:
        run_training(config)
    except UserError as error:
        (Path(config.run.dir) / f"error_rank{dist.get_rank()}.txt").write_text(str(error), encoding="utf-8")
        parallel_state.destroy_model_parallel()  # for the next job
