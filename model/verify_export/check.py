"""The outcome of one check of an export."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from conf.system.errors import UserError


class CheckOutcome(StrEnum):
    """The outcomes: passed; warned: usable, but worth a look; failed; skipped: impossible or not wanted."""

    passed = "pass"
    warned = "warn"
    failed = "fail"
    skipped = "skip"


@dataclass(frozen=True)
class ExportCheck:
    """One check that was made.

    Attributes:
        name: what was checked.
        outcome: passed, warned, failed or skipped.
        detail: what was found.
        remedy: what to do about it; empty if nothing needs to be done or `detail` says it.
    """

    name: str
    outcome: CheckOutcome
    detail: str
    remedy: str = ""

    @classmethod
    def passed(cls, name: str, detail: str) -> Self:
        """Report that nothing is wrong."""
        return cls(name, CheckOutcome.passed, detail)

    @classmethod
    def warned(cls, name: str, detail: str, remedy: str) -> Self:
        """Report what may be right, but is not what this project writes."""
        return cls(name, CheckOutcome.warned, detail, remedy)

    @classmethod
    def failed(cls, name: str, detail: str, remedy: str = "") -> Self:
        """Report a defect. remedy: may be empty if `detail`, the message of a UserError, says what to do."""
        return cls(name, CheckOutcome.failed, detail, remedy)

    @classmethod
    def skipped(cls, name: str, reason: str) -> Self:
        """Report that the check was not made."""
        return cls(name, CheckOutcome.skipped, reason)

    @classmethod
    def of_action(cls, name: str, action: Callable[[], str]) -> Self:
        """Run `action`, which returns the detail, and report failure if it raises UserError."""
        try:
            return cls.passed(name, action())
        except UserError as error:
            return cls.failed(name, str(error))
