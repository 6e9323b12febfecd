"""Choose the ranks of a job that are worth simulating, run each in a process of its own, and collect their reports."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from conf.schema import ParallelConfig, RunConfig
from conf.system.errors import UserError
from launch.simulate.device_kind import KINDS
from launch.simulate.fake_device import fake_cuda_environment, find_obstacle
from launch.simulate.rank_report import RankReport, read_report
from pretrain.run.run_folder import CONFIG_FILE, write_out

ROOT = Path(__file__).resolve().parents[2]
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def parse_ranks(text: str, parallel: ParallelConfig, num_gpus: int) -> list[int]:
    """Return the ranks that `distinct` or numbers such as `0,17,255` name. Raises: UserError."""
    if text == "distinct":
        return find_distinct_ranks(parallel, num_gpus)
    try:
        ranks = sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise UserError(f"--ranks {text}: give `distinct`, or numbers such as 0,17,{num_gpus - 1}") from None
    if ranks[0] < 0 or ranks[-1] >= num_gpus:
        raise UserError(f"--ranks {text}: ranks of {num_gpus} GPUs are 0 to {num_gpus - 1}")
    return ranks


def find_distinct_ranks(parallel: ParallelConfig, num_gpus: int) -> list[int]:
    """Return a rank of each kind: of every pipeline stage, and the other context-parallel ranks of the last one.

    Tensor-parallel ranks do the same work on equal shapes, and so do data-parallel ones but for the padding of their
    buffers, of which the first holds none, and of an evaluation's last sequences. Consecutive ranks are tensor, then
    context, then data, then pipeline parallel (megatron-core's order).
    """
    per_stage = num_gpus // parallel.pipeline_parallel
    stages = [stage * per_stage for stage in range(parallel.pipeline_parallel)]
    others = [stages[-1] + context * parallel.tensor_parallel for context in range(1, parallel.context_parallel)]
    return stages + others


@dataclass(frozen=True)
class Simulation:
    """Says what is simulated. config: its global batch is that of the simulated step. kind: of device (KINDS).

    document_tokens, scored_share: see stand_ins.SequenceKind. module: what each process runs, with first arguments.
    """

    config: RunConfig
    num_gpus: int
    kind: str = "h100"
    document_tokens: int | None = None
    scored_share: float = 1.0
    module: tuple[str, ...] = ("launch.simulate.one_rank",)
    _processes: list[subprocess.Popen[str]] = field(default_factory=list, init=False, repr=False)

    def run(
        self, ranks: Sequence[int], on_report: Callable[[RankReport], None] = lambda report: None
    ) -> list[RankReport]:
        """Simulate ranks side by side, one per core. on_report: called with each as soon as it is there.

        Raises: UserError if no device can be simulated on this machine, or the training code raises one.
        """
        obstacle = find_obstacle()
        if obstacle is not None:
            raise UserError(f"a rank cannot be simulated here: {obstacle}. launch.plan calculates without one.")
        cores = len(os.sched_getaffinity(0))
        with (
            tempfile.TemporaryDirectory(prefix="simulate_") as folder,
            fake_cuda_environment(KINDS[self.kind]) as clean,
        ):
            path = Path(folder) / CONFIG_FILE
            path.write_text(write_out(self.config), encoding="utf-8")
            environment = {name: value for name, value in clean.items() if name not in RANK_VARIABLES}
            environment |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            pool = ThreadPoolExecutor(min(cores, len(ranks)))
            try:
                waiting = [pool.submit(self._run_rank, rank, path, environment) for rank in ranks]
                for done in as_completed(waiting):
                    on_report(done.result())
                return [done.result() for done in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self._processes:
                    process.kill()
                raise
            finally:
                pool.shutdown()

    def _run_rank(self, rank: int, config: Path, environment: dict[str, str]) -> RankReport:
        report = config.parent / f"rank_{rank}.json"
        command = [sys.executable, "-m", *self.module, str(config), str(report)]
        command += ["--rank", str(rank), "--gpus", str(self.num_gpus), "--kind", self.kind]
        command += ["--scored-share", str(self.scored_share)]
        if self.document_tokens is not None:
            command += ["--document-tokens", str(self.document_tokens)]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            self._processes.append(process)
            _, output = process.communicate()
        if not report.exists():
            raise RuntimeError(f"rank {rank} could not be simulated (exit status {process.returncode}):\n{output}")
        return read_report(report)
