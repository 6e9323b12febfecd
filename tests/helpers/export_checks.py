"""Find and compare what the checks of an export found."""

from pathlib import Path

from model.checkpoint.checksums import SUMS_NAME
from model.verify_export.check import CheckOutcome, ExportCheck
from model.verify_export.verification import ExportVerification, verify_export


def find(found: ExportVerification, name: str) -> ExportCheck:
    return next(check for check in found.checks if check.name == name)


def outcomes(found: ExportVerification) -> dict[str, str]:
    return {check.name: f"{check.outcome}: {check.detail}" for check in found.checks}


def assert_found(export: Path, name: str, outcome: CheckOutcome, detail: str) -> None:
    """Assert that the named check has this outcome and detail, and that SHA256SUMS fails whatever was changed."""
    found = verify_export(export)
    check = find(found, name)
    assert check.outcome is outcome and detail in check.detail, outcomes(found)
    assert found.has_failed and find(found, "checksums").outcome is CheckOutcome.failed
    (export / SUMS_NAME).unlink()
    without = verify_export(export)
    assert without.has_failed is (outcome is CheckOutcome.failed), outcomes(without)
