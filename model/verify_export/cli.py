"""Verify an exported checkpoint: the command line of `python -m model.verify_export`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from conf.system.entry import OneLineParser, exit_status
from conf.system.errors import UserError
from model.verify_export.check import Check, Outcome

if TYPE_CHECKING:
    from model.verify_export.verify import Verification

EXIT_FAILED = 1
STYLES = {Outcome.passed: "green", Outcome.warned: "yellow", Outcome.failed: "bold red", Outcome.skipped: "dim"}
NAME_WIDTH = 18
EXAMPLES = """examples:
  # names, shapes, formats and values of the weights, configuration, tokenizer, code, adapter, checksums
  python -m model.verify_export exports/nld_8b_sft --report reports/nld_8b_sft.json

  # later, or elsewhere: is it still what was signed off?
  python -m model.verify_export exports/nld_8b_sft --check-report reports/nld_8b_sft.json

Exit status 0, 1 if a check fails (or, with --strict, warns), 2 if DIR is no export. Code in the directory is not run.
"""


def run_verify_export(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 1 if a check fails, 2 after one clear message, 130."""
    options = build_parser().parse_args(arguments)
    return exit_status(lambda: _run(options))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(
        prog="python -m model.verify_export",
        description="Check a directory in the exported format before you hand it on, or trust it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("export", type=Path, metavar="DIR", help="exported checkpoint, ours or a released one")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what was found as JSON, with a digest")
    parser.add_argument("--check-report", type=Path, metavar="FILE", help="are the files those of this report?")
    parser.add_argument("--skip-values", action="store_true", help="do not look for NaN and infinity in the weights")
    parser.add_argument(
        "--write-sums", action="store_true", help="if nothing fails, add SHA256SUMS where it is missing"
    )
    parser.add_argument("--strict", action="store_true", help="warnings count as failures")
    parser.add_argument("--json", action="store_true", help="print the report and nothing else")
    return parser


def _run(options: argparse.Namespace) -> int:
    from model.verify_export.report import build_report, load_report, refuse_report_inside, save_report
    from model.verify_export.verify import verify_export

    if options.report is not None:
        refuse_report_inside(options.report, options.export)
    earlier = load_report(options.check_report) if options.check_report is not None else None
    try:
        found = verify_export(options.export, read_values=not options.skip_values, record_sums=options.write_sums)
        if earlier is not None:
            found.checks.append(_compare(earlier, found))
        report = build_report(found)
        if options.report is not None:
            save_report(report, options.report)
    except OSError as error:
        raise UserError(f"{error.filename or options.export}: {error.strerror or error}") from error
    print_report(report, found, options)
    return EXIT_FAILED if found.has_failed or (options.strict and found.has_warned) else 0


def _compare(earlier: dict[str, Any], found: "Verification") -> Check:
    from model.convert.safetensors_reader import some
    from model.verify_export.check import failed, passed
    from model.verify_export.report import find_differences

    if differing := find_differences(earlier, found):
        return failed("report", f"not as signed off at {earlier['time']}: {some(differing)}", "fetch the export again")
    return passed("report", f"every file is as signed off at {earlier['time']} (outcome then: {earlier['outcome']})")


def print_report(report: dict[str, Any], found: "Verification", options: argparse.Namespace) -> None:
    """One line per check, then one for the whole."""
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
