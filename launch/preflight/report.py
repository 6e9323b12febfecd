"""What a person reads while the checks run and at the end; what a program reads instead."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.preflight.findings import Result
from launch.preflight.runner import Row
from launch.preflight.subject import Subject

STYLES = {Result.ok: "green", Result.warning: "yellow", Result.failed: "bold red"}
WIDTH = 120  # where there is no terminal to ask


def print_table(rows: list[Row], subject: Subject) -> None:
    """One row per finding, and how many are not ok, on standard output."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(f"{subject.config.run.dir} on {subject.nodes} nodes x {subject.gpus_per_node}", soft_wrap=True)
    table = Table()
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("detail", overflow="fold")
    former = ""
    for row in rows:
        name = row.check if row.check != former else ""
        table.add_row(name, Text(row.result.value, style=STYLES[row.result]), Text(row.detail))
        former = row.check
    console.print(table)


def print_json(rows: list[Row], subject: Subject) -> None:
    """The same as one JSON object on standard output."""
    checks = [{**asdict(row), "result": row.result.value} for row in rows]
    counts = {result.value: count(rows, result) for result in Result}
    values = {"run_dir": str(Path(subject.config.run.dir)), "world_size": subject.world_size, "checks": checks}
    print(json.dumps(values | {"counts": counts}, indent=2))


def count(rows: list[Row], result: Result) -> int:
    """Rows with this result."""
    return sum(row.result is result for row in rows)


def worst(rows: list[Row]) -> Result:
    """The result that decides: of one check, or of all."""
    order = list(Result)
    return max((row.result for row in rows), key=order.index)
