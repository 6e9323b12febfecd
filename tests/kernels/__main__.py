"""Compile every kernel of a run on CUDA for pretended devices, compare with the tables, and interpret the small ones.

`python -m tests.kernels [--kinds h100 b200] [--cases TEXT ...] [--write]`: TEXT is the beginning of cases' names.
"""

import argparse
import sys
import time

from launch.simulate.device_kind import KINDS
from tests.kernels.cases import list_large_cases, list_small_cases
from tests.kernels.golden import (
    compare_table_rows,
    count_changes,
    find_newest_table,
    find_table,
    format_table,
    load_table,
    make_table_rows,
    save_table,
)
from tests.kernels.judge import find_faults
from tests.kernels.processes import Outcome, find_reason_to_skip, try_cases_in_parallel


def main(arguments: list[str] | None = None) -> int:
    """Print the tables and what is wrong; return the exit status."""
    options = _read_options(arguments)
    reason = find_reason_to_skip()
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    large = [case.name for case in list_large_cases() if case.name.startswith(tuple(options.cases))]
    small = [case.name for case in list_small_cases() if case.name.startswith(tuple(options.cases))]
    try:
        faults = [fault for kind in options.kinds for fault in _report_kind(kind, large, options.write)]
        faults += _report_interpreted(small)
    except RuntimeError as error:  # a process of ours failed, and says in a line why, if it knows
        faults = [str(error)]
    print("\n".join(["", *(f"WRONG  {fault}" for fault in faults)]) if faults else "\nnothing is wrong")
    return 1 if faults else 0


def _read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of device")
    parser.add_argument("--cases", nargs="+", default=[""], help="beginnings of cases' names; all without")
    parser.add_argument("--write", action="store_true", help="write the tables instead of comparing with them")
    return parser.parse_args(arguments)


def _report_kind(kind: str, names: list[str], write: bool) -> list[str]:
    """Compile cases for one kind, print what came out, and return what is wrong."""
    if not names:
        return []
    started = time.perf_counter()
    outcomes = try_cases_in_parallel(kind, names, interpreted=False)
    table_rows = make_table_rows(outcomes)
    print(f"\n{kind}: {len(table_rows)} kernels in {time.perf_counter() - started:.0f} s\n{format_table(table_rows)}")
    if write:
        save_table(find_table(kind), _merge(kind, outcomes))
    path = find_newest_table(kind)
    if path is None:
        return [*find_faults(kind, outcomes), f"{kind}: no table yet: add --write"]
    before = [row for row in load_table(path) if row.case in outcomes]
    print(f"{count_changes(table_rows, before)} differences from {path.relative_to(path.parents[3])}")
    return find_faults(kind, outcomes) + [f"{kind}: {line}" for line in compare_table_rows(table_rows, before)]


def _merge(kind: str, outcomes: dict[str, Outcome]) -> list:
    """Return the rows of these cases, and those of other cases that the table has."""
    path = find_table(kind)
    names = {case.name for case in list_large_cases()} - outcomes.keys()
    others = [row for row in load_table(path) if row.case in names] if path.exists() else []
    return others + make_table_rows(outcomes)


def _report_interpreted(names: list[str]) -> list[str]:
    """Interpret cases, print the largest error of each, and return what is wrong."""
    if not names:
        return []
    started = time.perf_counter()
    outcomes = try_cases_in_parallel("h100", names, interpreted=True)
    print(f"\ninterpreted, float16, against float64: {len(outcomes)} cases in {time.perf_counter() - started:.0f} s")
    for name, outcome in outcomes.items():
        errors = outcome.errors or {}
        print(f"{name:44} " + "  ".join(f"{result} {error:.1e}" for result, error in errors.items()))
    return find_faults("h100", outcomes)


if __name__ == "__main__":
    sys.exit(main())
