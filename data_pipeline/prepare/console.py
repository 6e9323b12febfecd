"""Show how far a source is (a bar in a terminal, else a line now and then), and the finished sources as a table."""

import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from data_pipeline.storage.manifest import DatasetManifest

LINE_SECONDS = 10.0


class SourceProgress:
    """Shows bytes read of `total` (0: unknown), tokens made and records left out, on stderr. A context manager."""

    def __init__(self, name: str, total: int, done: int) -> None:
        self._name, self._total, self._done = name, total, done
        self.tokens = self._skipped = 0
        self._begin = self._printed = time.monotonic()
        self._begun_with = done
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = _build_bar(self._console) if self._console.is_terminal else None
        if self._bar:
            self._task = self._bar.add_task(self._title(), total=total or None, completed=done, rate=0.0)

    def __enter__(self) -> "SourceProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Return the seconds since the beginning."""
        return time.monotonic() - self._begin

    def advance(self, read: int, tokens: int, skipped: int) -> None:
        """Add bytes read, tokens made and records left out."""
        self._done += read
        self.tokens += tokens
        self._skipped += skipped
        if self._bar:
            rate = self.tokens / max(self.seconds, 1e-9)
            self._bar.update(self._task, completed=self._done, rate=rate, description=self._title())
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            self._printed = time.monotonic()
            self._console.print(self._line(), markup=False)

    def _title(self) -> str:
        return f"prepare {self._name}" + (f" ({self._skipped:,} records skipped)" if self._skipped else "")

    def _line(self) -> str:
        rate = self.tokens / self.seconds
        read = f"{self._done / 1e6:,.0f} MB"
        if self._total:
            read += f" of {self._total / 1e6:,.0f} MB"
            per_second = max(self._done - self._begun_with, 1) / self.seconds
            read += f", {max(self._total - self._done, 0) / per_second:,.0f} s left"
        return f"{self._title()}: {read}, {rate:,.0f} tokens/s"


class _RateColumn(TextColumn):
    """Shows the tokens per second of this run."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['rate']:,.0f} tokens/s")


def _build_bar(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _RateColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console)


@dataclass(frozen=True)
class SourceReport:
    """Reports what was done for a source.

    tokens_per_second, seconds: of this run; 0 where the dataset was there already. skipped: records by reason.
    warnings: what the user should look at.
    """

    name: str
    path: Path
    manifest: DatasetManifest
    skipped: dict[str, int]
    seconds: float
    tokens_per_second: float
    warnings: list[str]

    @property
    def was_up_to_date(self) -> bool:
        """Return whether there was nothing to do."""
        return self.seconds == 0


def print_report(reports: list[SourceReport]) -> None:
    """Print one line per source on standard output, warnings below."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(title="prepared data")
    has_images = any(report.manifest.images for report in reports)
    for heading in (
        "source",
        "documents",
        *(("images",) if has_images else ()),
        "tokens",
        "skipped",
        "tokens/s",
        "path",
    ):
        is_text = heading in ("source", "skipped", "path")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold" if is_text else "ellipsis")
    for report in reports:
        table.add_row(*map(escape, _cells(report, has_images)))
    console.print(table)
    for report in reports:
        if fixed := report.manifest.fixed_images:
            counts = ", ".join(f"{count:,} {what}" for what, count in fixed.items())
            console.print(f"{report.name}: images that are not shown as they are stored: {counts}", markup=False)
        for warning in report.warnings:
            console.print(f"warning: {report.name}: {warning}", markup=False)


def _cells(report: SourceReport, has_images: bool) -> tuple[str, ...]:
    skipped = "\n".join(f"{count:,} {reason}" for reason, count in report.skipped.items())
    rate = "up to date" if report.was_up_to_date else f"{report.tokens_per_second:,.0f}"
    images = (f"{report.manifest.images:,}",) if has_images else ()
    counts = (f"{report.manifest.documents:,}", *images, f"{report.manifest.tokens:,}")
    return (report.name, *counts, skipped or "0", rate, str(report.path))
