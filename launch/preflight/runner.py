"""Run checks on a job that has not started, and collect what they find.

A check is a generator of findings. Every check runs whatever the others found, except where it needs one that failed.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from conf.schema import Device, RunConfig
from conf.system.errors import UserError

if TYPE_CHECKING:  # these import torch, and a message about the configuration need not wait for it
    from pretrain.resume.start_point import StartPoint
    from pretrain.run.run_data import RunData


@dataclass(frozen=True)
class Gpu:
    """A CUDA device of this machine. total_bytes, free_bytes: of its memory, now."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass
class TrainingJob:
    """Describes the run that is to start, and passes on what earlier checks have learned about it.

    nodes, gpus_per_node: of the job; on CPU runs a rank is a process. gpus: devices of this machine, set by the check
    of devices. data, start: set by the checks of training data and of the start; None until then.
    """

    config: RunConfig
    nodes: int
    gpus_per_node: int
    gpus: list[Gpu] = field(default_factory=list)
    data: "RunData | None" = None
    start: "StartPoint | None" = None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node

    @property
    def run_dir(self) -> Path:
        """Run folder, which may not exist yet."""
        return Path(self.config.run.dir)

    @property
    def is_cpu_run(self) -> bool:
        """Whether the configuration asks for CPUs."""
        return self.config.runtime.device is Device.cpu


class Result(Enum):
    """Grade what a check found.

    warning: the job could run, but a person should know. failed: it would fail, or must not start.
    """

    ok = "ok"
    warning = "warning"
    failed = "failed"


@dataclass(frozen=True)
class Finding:
    """Holds one result of a check.

    detail: what was found and, unless it is ok, what to do. check: name of the check, which the runner fills in.
    """

    result: Result
    detail: str
    check: str = ""

    @classmethod
    def ok(cls, detail: str) -> "Finding":
        """Report that nothing needs to be done."""
        return cls(Result.ok, detail)

    @classmethod
    def warning(cls, detail: str) -> "Finding":
        """Report something a person should know although the job can start."""
        return cls(Result.warning, detail)

    @classmethod
    def failed(cls, detail: str) -> "Finding":
        """Report a reason why the job must not start."""
        return cls(Result.failed, detail)


@dataclass(frozen=True)
class PreflightCheck:
    """Names a check and what it depends on.

    run: yields at least one finding; an exception counts as a failed one. needs: names of earlier checks.
    """

    name: str
    run: Callable[[TrainingJob], Iterator[Finding]]
    needs: tuple[str, ...] = ()


def run_checks(
    job: TrainingJob, checks: Iterable[PreflightCheck], on_start: Callable[[str], None]
) -> Iterator[list[Finding]]:
    """Yield the findings of each check as it finishes. on_start: called with the name of the check that begins."""
    unusable: set[str] = set()  # checks that failed or did not run
    for check in checks:
        missing = [name for name in check.needs if name in unusable]
        if missing:
            findings = [Finding.warning(f"not checked: it needs what failed above ({', '.join(missing)})")]
            unusable.add(check.name)
        else:
            on_start(check.name)
            findings = _collect(check, job)
        if any(finding.result is Result.failed for finding in findings):
            unusable.add(check.name)
        yield [replace(finding, check=check.name) for finding in findings]


def _collect(check: PreflightCheck, job: TrainingJob) -> list[Finding]:
    """Return what a check found until its end or its first error."""
    findings: list[Finding] = []
    try:
        for finding in check.run(job):
            findings.append(finding)
    except UserError as error:
        findings.append(Finding.failed(str(error)))
    except Exception as error:  # a defect or a broken environment; the other checks can still report
        findings.append(Finding.failed(f"could not be checked: {type(error).__name__}: {error}"))
    return findings
