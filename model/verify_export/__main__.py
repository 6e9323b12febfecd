"""Verify an exported checkpoint: `python -m model.verify_export DIR`.

Torch and transformers are imported after the command line has been checked.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from conf.system.entry import OneLineParser, exit_status
from conf.system.errors import UserError
from model.verify_export.check import CheckOutcome, ExportCheck

if TYPE_CHECKING:
    from model.verify_export.verification import ExportVerification

EXIT_FAILED = 1
STYLES = {
    CheckOutcome.passed: "green",
    CheckOutcome.warned: "yellow",
    CheckOutcome.failed: "bold red",
    CheckOutcome.skipped: "dim",
}
NAME_WIDTH = 18
EXAMPLES = """examples:
  # names, shapes, formats and values of the weights, configuration, tokenizer, code, adapter, checksums
  python -m model.verify_export exports/nld_8b_sft --report reports/nld_8b_sft.json

  # later, or elsewhere: is it still what was signed off?
  python -m model.verify_export exports/nld_8b_sft --check-report reports/nld_8b_sft.json

Exit status 0, 1 if a check fails (or, with --strict, warns), 2 if DIR is not an export. Code in the directory is not
executed.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, 1 if a check fails, 2 after an error message, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    return exit_status(lambda: _run(options))


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = OneLineParser(
        prog="python -m model.verify_export",
        description="Check a directory in the exported format before you pass it on, or trust it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("export", type=Path, metavar="DIR", help="exported checkpoint, ours or a released one")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the results as JSON, with a digest")
    parser.add_argument(
        "--check-report", type=Path, metavar="FILE", help="check that the files are those of this report"
    )
    parser.add_argument("--skip-values", action="store_true", help="do not look for NaN and infinity in the weights")
    parser.add_argument(
        "--write-sums", action="store_true", help="if nothing fails, add SHA256SUMS where it is missing"
    )
    parser.add_argument("--strict", action="store_true", help="treat warnings as failures")
    parser.add_argument("--json", action="store_true", help="print the report and nothing else")
    return parser


def _run(options: argparse.Namespace) -> int:
    from model.verify_export.verification import verify_export
    from model.verify_export.verification_report import (
        build_verification_report,
        load_report,
        refuse_report_inside,
        save_report,
    )

    if options.report is not None:
        refuse_report_inside(options.report, options.export)
    earlier = load_report(options.check_report) if options.check_report is not None else None
    try:
        found = verify_export(options.export, read_values=not options.skip_values, record_sums=options.write_sums)
        if earlier is not None:
            found.checks.append(_compare(earlier, found))
        report = build_verification_report(found)
        if options.report is not None:
            save_report(report, options.report)
    except OSError as error:
        raise UserError(f"{error.filename or options.export}: {error.strerror or error}") from error
    print_checks(report, found, options)
    return EXIT_FAILED if found.has_failed or (options.strict and found.has_warned) else 0


def _compare(earlier: dict[str, Any], found: "ExportVerification") -> ExportCheck:
    from model.convert.safetensors_reader import some
    from model.verify_export.verification_report import find_differences

    if differing := find_differences(earlier, found):
        detail = f"not as signed off at {earlier['time']}: {some(differing)}"
        return ExportCheck.failed("report", detail, "fetch the export again")
    detail = f"every file is as signed off at {earlier['time']} (outcome then: {earlier['outcome']})"
    return ExportCheck.passed("report", detail)


def print_checks(report: dict[str, Any], found: "ExportVerification", options: argparse.Namespace) -> None:
    """Print one line per check and a last one for the whole, or with --json the report."""
    if options.json:
        print(json.dumps(report, indent=2), flush=True)
        return
    console = Console(highlight=False, soft_wrap=True)
    for check in found.checks:
        remedy = f" -> {check.remedy}" if check.remedy else ""
        line = Text.assemble(
            (f"{check.outcome:<5}", STYLES[check.outcome]), f"{check.name:<{NAME_WIDTH}} {check.detail}{remedy}"
        )
        console.print(line)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in report["counts"].items())
    where = f"; {options.report}" if options.report is not None else ""
    console.print(f"{report['outcome']}: {report['export']} ({counts}){where}; report digest {report['digest']}")


if __name__ == "__main__":
    sys.exit(main())
