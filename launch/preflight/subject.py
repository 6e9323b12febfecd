"""What is checked, and what checks learn for those after them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from conf.schema import Device, RunConfig

if TYPE_CHECKING:  # they import torch, which a message about the configuration need not wait for
    from pretrain.resume.start import StartPoint
    from pretrain.run.data import RunData


@dataclass(frozen=True)
class GpuFacts:
    """One CUDA device of this machine. total_bytes, free_bytes: of its memory, now."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass
class Subject:
    """A run that has not started.

    nodes, gpus_per_node: of the job; on CPU runs a rank is a process. gpus: those of this machine, once looked at.
    data, start: opened and decided by the checks of that name, None until then.
    """

    config: RunConfig
    nodes: int
    gpus_per_node: int
    gpus: list[GpuFacts] = field(default_factory=list)
    data: "RunData | None" = None
    start: "StartPoint | None" = None

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.gpus_per_node

    @property
    def run_dir(self) -> Path:
        """The run folder, which may not exist yet."""
        return Path(self.config.run.dir)

    @property
    def is_cpu_run(self) -> bool:
        """Whether the configuration asks for CPUs."""
        return self.config.runtime.device is Device.cpu


def nearest_existing(path: Path) -> Path:
    """`path`, or the folder above it that is there already."""
    path = path.absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())
