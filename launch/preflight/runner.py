"""Runs every check, whatever the others found."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from conf.system.errors import UserError
from launch.preflight.findings import Finding, Result, failed, warning
from launch.preflight.subject import Subject

CheckFunction = Callable[[Subject], Iterator[Finding]]


@dataclass(frozen=True)
class Check:
    """run: yields at least one finding; an error it raises is one that failed. needs: names of earlier checks."""

    name: str
    run: CheckFunction
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A finding with the name of its check."""

    check: str
    result: Result
    detail: str


def run_checks(subject: Subject, checks: Iterable[Check], started: Callable[[str], None]) -> Iterator[list[Row]]:
    """The rows of each check as it finishes. started: told the name of the one that begins."""
    unknown: set[str] = set()
    for check in checks:
        missing = [name for name in check.needs if name in unknown]
        if missing:
            findings = [warning(f"not checked: it needs what failed above ({', '.join(missing)})")]
            unknown.add(check.name)
        else:
            started(check.name)
            findings = _collect(check, subject)
        if any(finding.result is Result.failed for finding in findings):
            unknown.add(check.name)
        yield [Row(check.name, finding.result, finding.detail) for finding in findings]


def _collect(check: Check, subject: Subject) -> list[Finding]:
    """What a check found until its end or its first error."""
    findings: list[Finding] = []
    try:
        for finding in check.run(subject):
            findings.append(finding)
    except UserError as error:
        findings.append(failed(str(error)))
    except Exception as error:  # a defect, or a broken environment: the other checks still have something to say
        findings.append(failed(f"could not be checked: {type(error).__name__}: {error}"))
    return findings
