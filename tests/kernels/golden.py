"""Keep what kernels cost as tables beside the tests, one for each version of torch and kind of device, and compare."""

import csv
import importlib.metadata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from tests.kernels.compiled import Kernel
from tests.kernels.processes import Outcome

FOLDER = Path(__file__).with_name("golden")
COLUMNS = ("registers", "spill_stores", "spill_loads", "shared", "blocks", "tensor_core")


@dataclass(frozen=True)
class TableRow:
    """One kernel of a case; config: tiles, warps and stages, by which inductor's candidates differ."""

    case: str
    kernel: str
    config: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    blocks: int
    tensor_core: int

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what names it."""
        return self.case, self.kernel, self.config

    def worse_than(self, other: "TableRow") -> list[str]:
        """Return what has become worse: spills, blocks per multiprocessor, matmuls without tensor cores."""
        checks = {
            f"spills {self.spill_stores} / {self.spill_loads} bytes, not {other.spill_stores} / {other.spill_loads}": (
                self.spill_stores + self.spill_loads > other.spill_stores + other.spill_loads
            ),
            f"{self.blocks} blocks fit a multiprocessor, not {other.blocks}": self.blocks < other.blocks,
            "no tensor-core instructions are left": self.tensor_core == 0 < other.tensor_core,
        }
        return [text for text, is_worse in checks.items() if is_worse]


def make_table_rows(outcomes: dict[str, Outcome]) -> list[TableRow]:
    """Return the rows of these cases; a kernel with several candidates has one for each config.

    Two kernels of a case with one name and config, of its forward and backward, are numbered.
    """
    table_rows: list[TableRow] = []
    seen: Counter[tuple[str, str, str]] = Counter()
    for name, outcome in outcomes.items():
        for kernel in outcome.kernels:
            key = (name, kernel.name, describe_config(kernel))
            seen[key] += 1
            label = kernel.name if seen[key] == 1 else f"{kernel.name}#{seen[key]}"
            table_rows.append(TableRow(name, label, key[2], *(getattr(kernel, column) for column in COLUMNS)))
    return table_rows


def describe_config(kernel: Kernel) -> str:
    """Return tiles, warps and stages in one word each."""
    tiles = [f"{name}={size}" for name, size in sorted(kernel.config.items())]
    return " ".join([*tiles, f"warps={kernel.warps}", f"stages={kernel.stages}"])


def find_table(kind: str, version: str | None = None) -> Path:
    """Return the path of a device kind's table for this torch, or the version given."""
    version = version or importlib.metadata.version("torch").partition("+")[0]
    return FOLDER / f"torch-{version}" / f"{kind}.tsv"


def find_newest_table(kind: str) -> Path | None:
    """Return the table of this torch; without one, that of the newest version that has one; None without any."""
    if find_table(kind).exists():
        return find_table(kind)
    tables = FOLDER.glob(f"torch-*/{kind}.tsv")
    return max(tables, key=lambda path: Version(path.parent.name.removeprefix("torch-")), default=None)


def save_table(path: Path, table_rows: Iterable[TableRow]) -> None:
    """Write a table, sorted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(("case", "kernel", "config", *COLUMNS))
        for row in sorted(table_rows, key=lambda row: row.key):
            writer.writerow((*row.key, *(getattr(row, column) for column in COLUMNS)))


def load_table(path: Path) -> list[TableRow]:
    """Read a table."""
    with path.open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file, delimiter="\t"))
    return [
        TableRow(
            case=record["case"],
            kernel=record["kernel"],
            config=record["config"],
            **{name: int(record[name]) for name in COLUMNS},
        )
        for record in records
    ]


def compare_table_rows(table_rows: Iterable[TableRow], before: Iterable[TableRow]) -> list[str]:
    """Return what has become worse against a table, in lines.

    Kernels of a case that the table lacks count; cases that it lacks, or that were not tried, do not.
    """
    table_rows, before = list(table_rows), list(before)
    cases = {row.case for row in table_rows} & {row.case for row in before}
    old = {row.key: row for row in before if row.case in cases}
    new = {row.key: row for row in table_rows if row.case in cases}
    lines = [f"{' '.join(key)}: {text}" for key in new.keys() & old.keys() for text in new[key].worse_than(old[key])]
    lines += [f"{' '.join(key)}: not in the table" for key in new.keys() - old.keys()]
    lines += [f"{' '.join(key)}: in the table, but not compiled" for key in old.keys() - new.keys()]
    return sorted(lines)


def count_changes(table_rows: Iterable[TableRow], before: Iterable[TableRow]) -> int:
    """Return how many rows differ from the table in any way."""
    difference = Counter(table_rows)
    difference.subtract(Counter(before))
    return sum(map(abs, difference.values()))


def format_table(table_rows: list[TableRow]) -> str:
    """Return the rows as text in columns."""
    header = ("case", "kernel", "config", "registers", "spills", "shared", "blocks/SM", "tensor-core")
    lines = [header, *(_format_row(row) for row in table_rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def _format_row(row: TableRow) -> tuple[str, ...]:
    kernel = row.kernel if len(row.kernel) < 48 else row.kernel[:30] + ".." + row.kernel[-16:]
    spills, shared = f"{row.spill_stores}/{row.spill_loads} B", f"{row.shared / 1024:.1f} KiB"
    figures = (str(row.registers), spills, shared, str(row.blocks), str(row.tensor_core))
    return (row.case, kernel, row.config, *figures)
