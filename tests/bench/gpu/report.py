"""The table of the GPU benchmark: on the console, and as rows for tests/bench/GPU.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tests.bench.gpu.figures import build_figures, list_failures


def print_results(results: Mapping[str, Any], output: Path) -> None:
    """Print every figure, what failed, what a step's time consists of, and where the numbers are."""
    console = Console(width=140, highlight=False)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in list_columns(results["settings"]["lengths"]):
        table.add_column(column)
    for row in list_table_rows(results["parts"], results["settings"]["lengths"]):
        table.add_row(*row)
    console.print(table)
    for line in [*_notes(results), f"{output}"]:
        console.print(line, markup=False)


def format_markdown(results: Mapping[str, Any]) -> str:
    """Return what is pasted into GPU.md: machine and versions, the table, notes."""
    lines = [f"| {key} | {value} |" for key, value in results["environment"].items()]
    lines = ["| | |", "|---|---|", *lines, "", *format_table(results["parts"], results["settings"]["lengths"])]
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(results))]).rstrip() + "\n"


def format_table(parts: Mapping[str, Any], lengths: list[int]) -> list[str]:
    """Return the table as lines of markdown."""
    columns = list_columns(lengths)
    table_rows = [f"| {' | '.join(row)} |" for row in list_table_rows(parts, lengths)]
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *table_rows]


def list_columns(lengths: list[int]) -> list[str]:
    """List the columns of the table."""
    return ["figure", "wanted", *(f"L {length}" for length in lengths)]


def list_table_rows(parts: Mapping[str, Any], lengths: list[int]) -> list[list[str]]:
    """List the rows of the table, each with as many cells as columns."""
    return [
        [figure.name, figure.wanted(), *(figure.cell(parts, length) for length in lengths)]
        for figure in build_figures()
    ]


def _notes(results: Mapping[str, Any]) -> list[str]:
    parts = results["parts"]
    notes = [f"failed: {failure}" for failure in list_failures(parts)]
    notes += [f"not run: {name}" for name in results.get("left_out", [])]
    for length, shares in parts.get("profile", {}).items():
        if "error" not in shares:
            costs = ", ".join(f"{kernel[:60]} {share:.1%}" for kernel, share in shares.items())
            notes.append(f"joint step at L {length}, share of time: {costs}")
    return notes
