"""Choose the ranks of a job that are worth simulating, run each in a process of its own, and collect their reports."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from conf.schema import ParallelConfig, RunConfig
from conf.system.errors import UserError
from launch.simulate.fake_machine import FakeMachine, fake_machine
from launch.simulate.rank_report import RankReport, read_report


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
    """Says what is simulated. config: its global batch is that of the simulated step. device: of which kind (KINDS).

    document_tokens, scored_share: see launch.plan.step_work.SequenceKind. module: what each process runs, with first
    arguments.
    """

    config: RunConfig
    num_gpus: int
    device: str = "h100"
    document_tokens: int | None = None
    scored_share: float = 1.0
    module: tuple[str, ...] = ("launch.simulate.one_rank",)

    def run(
        self, ranks: Sequence[int], on_report: Callable[[RankReport], None] = lambda report: None
    ) -> list[RankReport]:
        """Simulate ranks side by side, one per core. on_report: called with each as soon as it is there.

        Raises: UserError if no device can be simulated on this machine, or the training code raises one.
        """
        cores = len(os.sched_getaffinity(0))
        with fake_machine(self.device, self.config) as machine:
            pool = ThreadPoolExecutor(min(cores, len(ranks)))
            try:
                waiting = [pool.submit(self._run_rank, rank, machine) for rank in ranks]
                for done in as_completed(waiting):
                    on_report(done.result())
                return [done.result() for done in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                machine.end()
                raise
            finally:
                pool.shutdown()

    def _run_rank(self, rank: int, machine: FakeMachine) -> RankReport:
        options = ["--rank", str(rank), "--gpus", str(self.num_gpus), "--kind", self.device]
        options += ["--scored-share", str(self.scored_share)]
        if self.document_tokens is not None:
            options += ["--document-tokens", str(self.document_tokens)]
        return read_report(machine.run(f"rank {rank}", self.module, *options))
