"""Builds, saves and compares the report that signs off an export: what was checked, with what, in which files.

A digest over the report reveals one that was cut off or edited by mistake. It is not a signature, since whoever changes
the report can compute it again: store the digest, which is printed, elsewhere, or sign the file.
"""

import hashlib
import json
import platform
import tomllib
from collections import Counter
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from conf.system.atomic import atomic_write_text
from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from model.verify_export.verification import ExportVerification

FORMAT_VERSION = 1
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
DIGEST = "digest"


def build_verification_report(found: ExportVerification) -> dict[str, Any]:
    """Build the report as a JSON object. It names the export by its folder and files relative to that."""
    export = found.directory.resolve()
    report = {
        "format_version": FORMAT_VERSION,
        "tool": {"name": "model.verify_export", "version": read_project_version()},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
        "export": export.name,
        "outcome": "fail" if found.has_failed else "pass with warnings" if found.has_warned else "pass",
        "counts": dict(Counter(str(check.outcome) for check in found.checks)),
        "checks": [
            {"name": check.name, "outcome": str(check.outcome), "detail": check.detail, "remedy": check.remedy}
            for check in found.checks
        ],
        "facts": found.properties,  # the key of reports since their first version
        "files": {
            name: {"sha256": value, "bytes": (export / name).stat().st_size} for name, value in found.sums.items()
        },
    }
    return report | {DIGEST: compute_digest(report)}


def compute_digest(report: dict[str, Any]) -> str:
    """Compute sha256 of the report without its digest, as JSON with sorted keys, without spaces, in UTF-8."""
    content = {key: value for key, value in report.items() if key != DIGEST}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def save_report(report: dict[str, Any], path: Path) -> None:
    """Write the report, complete or not at all. Raises: OSError."""
    atomic_write_text(path, json.dumps(report, indent=2) + "\n")


def refuse_report_inside(path: Path, export: Path) -> None:
    """Refuse a report inside the export or in place of a folder. Raises: UserError."""
    if path.resolve().is_relative_to(export.resolve()):
        raise UserError(f"--report {path} is inside the export: choose a place outside of it")
    if path.is_dir():
        raise UserError(f"--report {path} is a folder: give a file name")


def load_report(path: Path) -> dict[str, Any]:
    """Load a report. Raises: UserError if it is missing, of another version, or not as it was written."""
    report = read_json_object(path, f"there is no report {path}")
    if report.get("format_version") != FORMAT_VERSION or not _has_all(report):
        raise UserError(f"{path} is not a report of this version of the project")
    if compute_digest(report) != report.get(DIGEST):
        raise UserError(f"{path} is not as it was written: its digest differs; verify the export again")
    return report


def _has_all(report: dict[str, Any]) -> bool:
    """Return whether the report holds everything that an export is compared with."""
    files = report.get("files")
    return (
        isinstance(files, dict)
        and all(isinstance(values, dict) and isinstance(values.get("sha256"), str) for values in files.values())
        and all(isinstance(report.get(key), str) for key in ("time", "outcome"))
    )


def find_differences(report: dict[str, Any], found: ExportVerification) -> list[str]:
    """Return the files that are not those of the report: missing, new or changed."""
    then = {name: values["sha256"] for name, values in report["files"].items()}
    return sorted(name for name in then.keys() | found.sums.keys() if then.get(name) != found.sums.get(name))


def read_project_version() -> str:
    """Read the version in pyproject.toml."""
    path = Path(__file__).parents[2] / "pyproject.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))["project"]["version"]
