"""Compile FlashAttention 4's kernels under our masks for pretended devices, and say which masks and blocks it refuses.

`python -m tests.kernels.flash [--kinds h100 b200] [--packages FOLDER] [--write]`: FOLDER has the extra `flash`; without
it a copy is installed for the time of the run.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from launch.simulate.device_kind import KINDS
from tests.kernels.flash.cases import list_cases
from tests.kernels.flash.processes import compile_cases, install
from tests.kernels.flash.table import (
    DIRECTIONS,
    Outcome,
    format_tables,
    list_refusals,
    read_refusals,
    write_tables,
)
from tests.kernels.processes import find_reason_to_skip


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, and times per case; return 1 where a refusal differs from the document."""
    options = _read_options(arguments)
    reason = find_reason_to_skip()
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        packages = options.packages or install(Path(folder))
        outcomes = {kind: _compile_kind(kind, packages) for kind in options.kinds}
    print(f"\n{format_tables(outcomes)}")
    if options.write:
        write_tables(format_tables(outcomes))
    before = read_refusals()
    differ = [case for case, refused in list_refusals(outcomes).items() if before.get(case) != refused]
    print("\n".join(["", *(f"DIFFERS  {', '.join(case)}" for case in differ)]) if differ else "\nas in README.md")
    return 1 if differ else 0


def _read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.flash", description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of device")
    parser.add_argument("--packages", type=Path, help="a folder with the extra `flash`")
    parser.add_argument("--write", action="store_true", help="write the tables into README.md")
    options = parser.parse_args(arguments)
    if options.write and len(options.kinds) < len(KINDS):
        parser.error("--write writes the tables of all kinds")
    return options


def _compile_kind(kind: str, packages: Path) -> list[Outcome]:
    started = time.perf_counter()
    outcomes = compile_cases(kind, [case.name for case in list_cases(kind)], packages)
    print(f"{kind}: {len(outcomes)} cases in {time.perf_counter() - started:.0f} s")
    for outcome in outcomes:
        times = [f"lowered in {outcome.seconds:.0f} s"]
        for direction in DIRECTIONS:
            found = outcome.directions.get(direction)
            times += [f"{direction} {found.seconds:.0f} s" if found else f"{direction}: none"]
        print(f"  {outcome.mask}, blocks of {outcome.blocks[0]} x {outcome.blocks[1]}: {', '.join(times)}")
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
