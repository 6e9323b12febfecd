"""Simulate a job from its configuration, as launch.simulate and `launch.plan --check` do."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from rich.console import Console

from conf.rules.layout import data_parallel_size, num_microbatches
from conf.rules.run import check_rules
from conf.schema import AttentionBackend, Device, RunConfig
from conf.system.errors import UserError
from launch.simulate.compare import Compared, compare
from launch.simulate.device_kind import KINDS
from launch.simulate.faults import Fault, find_faults
from launch.simulate.rank_report import RankReport
from launch.simulate.ranks import Simulation, parse_ranks
from model.megatron.kernel_choice import require_no_transformer_engine

WITHOUT_TRANSFORMER_ENGINE = "its kernels do not run on fake tensors. Simulate other settings"


@dataclass(frozen=True)
class SimulatedJob:
    """Holds what was simulated and what ranks reported.

    config: of the simulated step, which may be shorter. device: see KINDS.
    """

    config: RunConfig
    num_gpus: int
    device: str
    reports: list[RankReport]

    @cached_property
    def faults(self) -> list[Fault]:
        """What the job should not do."""
        return find_faults(self.reports, self.memory_bytes)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a rank in the simulated step."""
        return num_microbatches(self.config, self.num_gpus)

    @property
    def memory_bytes(self) -> int:
        """Memory of a device of this kind."""
        return KINDS[self.device].memory

    @cached_property
    def compared(self) -> dict[int, list[Compared]]:
        """Figures of each rank that ran to its end, simulated and planned."""
        return {report.rank: compare(self.config, report) for report in self.reports if report.step is not None}

    def describe(self) -> dict[str, Any]:
        """Describe all of it by plain values: bytes, FLOPs, times."""
        return {
            "ranks": [asdict(report) for report in self.reports],
            "compared": {
                rank: [asdict(figure) | {"difference": figure.difference} for figure in figures]
                for rank, figures in self.compared.items()
            },
            "faults": [asdict(fault) for fault in self.faults],
        }


def simulate_job(
    config: RunConfig,
    num_gpus: int,
    ranks: str = "distinct",
    microbatches: int | None = None,
    document_tokens: int | None = None,
    scored_share: float = 1.0,
    device: str = "h100",
) -> SimulatedJob:
    """Simulate ranks of a job, saying on standard error which are done; arguments as launch.simulate's options.

    Raises: UserError if the job cannot run like this, or no device can be simulated here.
    """
    config = shorten_step(config, num_gpus, microbatches)
    require_no_transformer_engine(config.parallel, config.precision, WITHOUT_TRANSFORMER_ENGINE)
    chosen = parse_ranks(ranks, config.parallel, num_gpus)
    simulation = Simulation(config, num_gpus, device, document_tokens, scored_share)
    console = Console(stderr=True, highlight=False)
    with console.status(f"simulating {len(chosen)} of {num_gpus} ranks ..."):
        reports = simulation.run(
            chosen, lambda report: console.print(f"rank {report.rank}: {report.error or f'{report.seconds:.0f} s'}")
        )
    return SimulatedJob(config, num_gpus, device, reports)


def shorten_step(config: RunConfig, num_gpus: int, microbatches: int | None) -> RunConfig:
    """Return the run on CUDA with so many microbatches per rank and step; None: as fill the pipeline, at least 2.

    Raises: ConfigError if the configuration cannot run on this number of GPUs.
    """
    if config.runtime.device is Device.cpu or config.runtime.attention_backend is AttentionBackend.cpu:
        raise UserError("runtime=cpu: GPUs are simulated, so leave it out")
    config = replace(config, runtime=replace(config.runtime, device=Device.cuda))
    check_rules(config, num_gpus)
    parallel, train = config.parallel, config.train
    filling = max(2, parallel.pipeline_parallel * (2 if parallel.virtual_pipeline_parallel > 1 else 1))
    chosen = microbatches or min(filling, num_microbatches(config, num_gpus))
    size = chosen * train.micro_batch_size * data_parallel_size(config, num_gpus)
    shortened = replace(config, train=replace(train, global_batch_size=size))
    check_rules(shortened, num_gpus)
    return shortened
