"""Compare installed packages with pyproject.toml. launch/setup.sh runs it with the interpreter to check.

    check_environment.py [--extra NAME] [--without NAME]              print what is missing; exit 1 if anything is
    check_environment.py [--extra NAME] [--without NAME] --list       print requirement lines for pip
    check_environment.py [--extra NAME] [--without NAME] --damaged    print those whose files are gone: reinstall them

It reads installed metadata and imports none of the packages, which takes 0.1 s instead of 10 s.
"""

import argparse
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def read_requirements(extras: list[str], without: list[str]) -> list[str]:
    """Return the requirement lines of the project and the named extras, except for the packages in `without`."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [line for line in lines if re.split(r"[^\w.-]", line)[0] not in without]


def find_problems(lines: list[str]) -> list[str]:
    """Describe each package that is missing, has lost its files, or has a version the line does not allow."""
    from packaging.requirements import Requirement

    return [problem for line in lines if (problem := _find_problem(Requirement(line)))]


def find_damaged(lines: list[str]) -> list[str]:
    """Return the lines of packages that are registered as installed although their folders are gone."""
    from packaging.requirements import Requirement

    return [line for line in lines if _lost_folders(Requirement(line).name)]


def _find_problem(requirement: Any) -> str | None:
    try:
        found = distribution(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(found.version, prereleases=True):
        return f"{requirement.name} {found.version} is installed, {requirement.specifier} is needed"
    lost = _lost_folders(requirement.name)
    return f"{requirement.name} has lost its files: {', '.join(lost)}" if lost else None


def _lost_folders(name: str) -> list[str]:
    """Return the top-level packages that the distribution's RECORD names and that no longer exist."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return []
    record = found.read_text("RECORD") or ""
    folders = set(re.findall(r"^(\w+)/__init__\.py,", record, re.MULTILINE))
    return sorted(folder for folder in folders if not Path(str(found.locate_file(folder))).is_dir())


def main() -> int:
    """Print what was asked for, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", action="append", default=[])
    parser.add_argument("--without", action="append", default=[])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--damaged", action="store_true")
    arguments = parser.parse_args()
    lines = read_requirements(arguments.extra, arguments.without)
    if arguments.list:
        print("\n".join(lines))
        return 0
    try:
        if arguments.damaged:
            print(*find_damaged(lines), sep="\n", end="")
            return 0
        version("tri-mode")
        problems = find_problems(lines)
    except ImportError as error:  # this project, or `packaging`, which several requirements depend on
        problems = [f"{error.name} is not installed"]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
