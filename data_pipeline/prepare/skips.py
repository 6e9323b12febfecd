"""How many rows may be unusable before preparing stops."""

from collections.abc import Sequence
from pathlib import Path

from conf.errors import UserError
from data_pipeline.prepare.finish import locate_row
from data_pipeline.prepare.plan import Part
from data_pipeline.prepare.shards import NUM_EXAMPLES, Advance, ShardRecord

SMALLEST_EARLY_COUNT = 100  # an early stop must rest on more than a few rows


class SkipLimit:
    """Stops a run as soon as too many rows are unusable even if no other one will be.

    total: bytes of all parts, 0 if unknown. max_share: of the rows. done: records of earlier runs.
    """

    def __init__(self, parts: list[Part], total: int, max_share: float, done: list[ShardRecord]) -> None:
        self._parts, self._total, self._max_share = parts, total, max_share
        self._rows = sum(record.rows for record in done)
        self._skipped = sum(sum(record.skipped.values()) for record in done)
        self._read = sum(record.progress for record in done)
        self._examples: list[tuple[int, int, str]] = []

    def advance(self, step: Advance) -> None:
        """Count what a worker reports. Raises UserError, with examples, when it is too much."""
        self._rows += step.rows
        self._skipped += step.skipped
        self._read += step.progress
        if len(self._examples) < NUM_EXAMPLES:
            self._examples += [(step.part, row, reason) for row, reason in step.examples]
        if self._skipped >= SMALLEST_EARLY_COUNT and self._skipped > self._max_share * self._expected_rows():
            examples = [locate_row(self._parts[n], row, why) for n, row, why in sorted(self._examples)[:NUM_EXAMPLES]]
            raise UserError(self.message(self._skipped, self._rows, self._max_share, examples))

    @staticmethod
    def message(skipped: int, rows: int, max_share: float, examples: Sequence[str], path: Path | None = None) -> str:
        """The error for too many unusable rows. path: of the list of all of them."""
        lines = "".join(f"\n  {example}" for example in examples)
        return (
            f"{skipped} of {rows} rows are unusable, more than data.prepare.max_skipped_share={max_share:g}: mend the "
            f"input, or raise the share to leave them out.{f' All are in {path}.' if path else ''} The first:{lines}"
        )

    def _expected_rows(self) -> float:
        """Rows of the whole source if the rest is like what was read."""
        return self._rows * (max(1.0, self._total / max(self._read, 1)) if self._total else 1.0)
