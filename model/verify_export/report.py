"""The signed-off report: what was checked, with what, in which files; and a digest over the report itself.

The digest tells a report that was cut off or edited by mistake. It is no signature: who changes the report can compute
it anew, so keep it apart from the report (it is printed), or sign the file.
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
from model.verify_export.verify import Verification

FORMAT_VERSION = 1
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
DIGEST = "digest"


def build_report(found: Verification) -> dict[str, Any]:
    """The report as a JSON object. Names files relative to the export and the export by its folder's name alone."""
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
        "facts": found.facts,
        "files": {
            name: {"sha256": value, "bytes": (export / name).stat().st_size} for name, value in found.sums.items()
        },
    }
    return report | {DIGEST: compute_digest(report)}


def compute_digest(report: dict[str, Any]) -> str:
    """sha256 of the report without its digest, as JSON with sorted keys, without spaces, in UTF-8."""
    content = {key: value for key, value in report.items() if key != DIGEST}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def save_report(report: dict[str, Any], path: Path) -> None:
    """Write it, complete or not at all. Raises: OSError."""
    atomic_write_text(path, json.dumps(report, indent=2) + "\n")


def refuse_report_inside(path: Path, export: Path) -> None:
    """Raises: UserError if the report would lie in the export, or take the place of a folder."""
    if path.resolve().is_relative_to(export.resolve()):
        raise UserError(f"--report {path} lies in the export: choose a place outside of it")
    if path.is_dir():
        raise UserError(f"--report {path} is a folder: give a file name")


def load_report(path: Path) -> dict[str, Any]:
    """A report that is as it was written. Raises: UserError otherwise."""
    report = read_json_object(path, f"there is no report {path}")
    if report.get("format_version") != FORMAT_VERSION or not _has_all(report):
        raise UserError(f"{path} is no report of this version of the project")
    if compute_digest(report) != report.get(DIGEST):
        raise UserError(f"{path} is not as it was written: its digest is another one; verify the export again")
    return report


def _has_all(report: dict[str, Any]) -> bool:
    """Whether everything is there that an export is compared with."""
    files = report.get("files")
    return (
        isinstance(files, dict)
        and all(isinstance(values, dict) and isinstance(values.get("sha256"), str) for values in files.values())
        and all(isinstance(report.get(key), str) for key in ("time", "outcome"))
    )


def find_differences(report: dict[str, Any], found: Verification) -> list[str]:
    """Files that are not those of the report: missing, new or changed."""
    then = {name: values["sha256"] for name, values in report["files"].items()}
    return sorted(name for name in then.keys() | found.sums.keys() if then.get(name) != found.sums.get(name))


def read_project_version() -> str:
    """The version in pyproject.toml."""
    path = Path(__file__).parents[2] / "pyproject.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))["project"]["version"]
