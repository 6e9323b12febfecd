"""What was made of the sources, as a table."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_pipeline.prepare.run import SourceReport


def print_report(reports: list[SourceReport]) -> None:
    """One row per source on standard output, warnings below."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(title="prepared data")
    for heading in ("source", "documents", "tokens", "skipped", "tokens/s", "path"):
        is_text = heading in ("source", "skipped", "path")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold" if is_text else "ellipsis")
    for report in reports:
        table.add_row(*map(escape, _cells(report)))
    console.print(table)
    for report in reports:
        for warning in report.warnings:
            console.print(f"warning: {report.name}: {warning}", markup=False)


def _cells(report: SourceReport) -> tuple[str, ...]:
    skipped = "\n".join(f"{count:,} {reason}" for reason, count in report.skipped.items())
    rate = "up to date" if report.was_up_to_date else f"{report.tokens_per_second:,.0f}"
    counts = (f"{report.manifest.documents:,}", f"{report.manifest.tokens:,}")
    return (report.name, *counts, skipped or "0", rate, str(report.path))
