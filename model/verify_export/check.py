"""What one check of an export found."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from conf.system.errors import UserError


class Outcome(StrEnum):
    """passed; warned: usable, but look at it; failed; skipped: could not or should not be made."""

    passed = "pass"
    warned = "warn"
    failed = "fail"
    skipped = "skip"


@dataclass(frozen=True)
class Check:
    """name: what was looked at. detail: what was found. remedy: what to do about it, empty where nothing is."""

    name: str
    outcome: Outcome
    detail: str
    remedy: str = ""


def passed(name: str, detail: str) -> Check:
    """A check that found nothing wrong."""
    return Check(name, Outcome.passed, detail)


def warned(name: str, detail: str, remedy: str) -> Check:
    """A check that found what may be right, but is not what this project writes."""
    return Check(name, Outcome.warned, detail, remedy)


def failed(name: str, detail: str, remedy: str = "") -> Check:
    """A check that found a defect. remedy: may be empty if `detail`, the message of a UserError, says what to do."""
    return Check(name, Outcome.failed, detail, remedy)


def skipped(name: str, reason: str) -> Check:
    """A check that was not made."""
    return Check(name, Outcome.skipped, reason)


def check_refusal(name: str, action: Callable[[], str]) -> Check:
    """The check that `action`, which gives the detail, raises no UserError."""
    try:
        return passed(name, action())
    except UserError as error:
        return failed(name, str(error))
