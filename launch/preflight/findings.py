"""What a check finds."""

from dataclasses import dataclass
from enum import Enum


class Result(Enum):
    """failed: the job would fail or must not start. warning: it would run, and a person should know."""

    ok = "ok"
    warning = "warning"
    failed = "failed"


@dataclass(frozen=True)
class Finding:
    """One row of the table. detail: what was found and, unless it is ok, what to do."""

    result: Result
    detail: str


def ok(detail: str) -> Finding:
    """Nothing to do."""
    return Finding(Result.ok, detail)


def warning(detail: str) -> Finding:
    """The job can start."""
    return Finding(Result.warning, detail)


def failed(detail: str) -> Finding:
    """The job must not start."""
    return Finding(Result.failed, detail)
