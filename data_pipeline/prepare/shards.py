"""A part of a source to its shards, each with a record that says it is complete.

While a source is being prepared its folder holds `.work/<shard>.json`, the record of every complete shard, and
`.work/<shard>.skipped.jsonl`, the rows left out of it. Both number rows from the part's first one: a part of a .jsonl
does not know how many lines come before it. finish.py knows, when all parts are done.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from conf.system.atomic import atomic_write_bytes, atomic_write_text
from conf.system.errors import UserError
from data_pipeline.prepare.encoders import RowEncoder, Segments, Skip
from data_pipeline.prepare.plan import Part
from data_pipeline.prepare.readers import RowBatch, Selection, Wanted, read_rows
from data_pipeline.prepare.writer import ShardFacts, ShardWriter, writing

WORK_FOLDER = ".work"
BATCH_BYTES = 1 << 18


@dataclass(frozen=True)
class Job:
    """What all parts of a source have in common. directory: of the dataset. See conf.schema for the rest."""

    directory: Path
    kind: str
    tokenizer_dir: Path
    mask_token: str
    chat_template: str | None
    column: str
    selection: Selection
    shard_bytes: int
    dtype: str

    @property
    def wanted(self) -> Wanted:
        """What to read. A batch is never cut, so it must not be larger than a shard."""
        return Wanted(self.column, self.selection, min(BATCH_BYTES, self.shard_bytes))


@dataclass(frozen=True)
class ShardRecord:
    """A complete shard. first_row, end_row: counted from the part's first row. rows: taken, skipped ones included.

    progress: of Part.size. is_last: whether the part ends here.
    """

    name: str
    facts: ShardFacts
    first_row: int
    end_row: int
    rows: int
    skipped: dict[str, int]
    progress: int
    is_last: bool


@dataclass
class Advance:
    """What was done since the last report. progress: of Part.size. skipped: rows."""

    progress: int
    tokens: int
    skipped: int


def shard_name(part: int, piece: int) -> str:
    """Name of shard `piece` of part `part`; names sort in the order of the rows."""
    return f"shard_{part:05d}_{piece:04d}"


def tokenize_part(
    job: Job, part: Part, piece: int, skip: int, encoder: RowEncoder, report: Callable[[Advance], None]
) -> None:
    """Write the shards of `part`, from shard `piece` and row `skip` on (both 0 at first).

    report: is told after every batch.
    Raises UserError if the input cannot be read or a shard cannot be written; complete shards stay.
    """
    shard = _OpenShard(job, part, piece, skip)
    try:
        for batch in read_rows(part, job.wanted, skip):
            if part.is_stream and shard.text_bytes >= job.shard_bytes:
                shard.publish(is_last=False)
                shard = _OpenShard(job, part, shard.piece + 1, shard.end_row)
            report(shard.add(batch, encoder))
        shard.publish(is_last=True)
    finally:
        shard.discard()


class _OpenShard:
    """A shard being written."""

    def __init__(self, job: Job, part: Part, piece: int, first_row: int) -> None:
        self.piece, self.end_row, self.text_bytes = piece, first_row, 0
        self._job, self._part, self._first_row = job, part, first_row
        self._name = shard_name(part.number, piece)
        self._writer = ShardWriter(job.directory / self._name, job.dtype, job.kind == "chat")
        self._skipped_lines: list[bytes] = []
        self._skipped: Counter[str] = Counter()
        self._rows = self._progress = 0

    def add(self, batch: RowBatch, encoder: RowEncoder) -> Advance:
        """Encode and append the batch."""
        documents, skips = _encode(batch, encoder)
        tokens = self._writer.add(documents)
        for number, skip in skips:
            self._skipped[skip.reason] += 1
            row = {"file": self._part.name, "row": number, "reason": skip.reason, "detail": skip.detail}
            self._skipped_lines.append(orjson.dumps(row) + b"\n")
        self.end_row = batch.end
        self.text_bytes += batch.text_bytes
        self._rows += len(batch.numbers)
        self._progress += batch.progress
        return Advance(batch.progress, tokens, len(skips))

    def publish(self, is_last: bool) -> None:
        """Final names for the files, then the record that says they are complete."""
        facts = self._writer.publish()
        work = self._job.directory / WORK_FOLDER
        record = ShardRecord(
            name=self._name,
            facts=facts,
            first_row=self._first_row,
            end_row=self.end_row,
            rows=self._rows,
            skipped=dict(sorted(self._skipped.items())),
            progress=self._progress,
            is_last=is_last,
        )
        with writing(work):
            if self._skipped_lines:
                atomic_write_bytes(skipped_path(self._job.directory, self._name), b"".join(self._skipped_lines))
            atomic_write_text(_record_path(self._job.directory, self._name), json.dumps(asdict(record)) + "\n")

    def discard(self) -> None:
        """Remove what was not published."""
        self._writer.discard()


def _encode(batch: RowBatch, encoder: RowEncoder) -> tuple[list[Segments], list[tuple[int, Skip]]]:
    """Documents in order, and (row, reason) of the rows without one."""
    readable = [value for value in batch.values if not isinstance(value, Skip)]
    encoded = iter(encoder.encode(readable))
    results = [value if isinstance(value, Skip) else next(encoded) for value in batch.values]
    documents = [result for result in results if not isinstance(result, Skip)]
    numbered = zip(batch.numbers, results, strict=True)
    return documents, [(number, result) for number, result in numbered if isinstance(result, Skip)]


def load_records(directory: Path, part: int) -> list[ShardRecord]:
    """Records of the complete shards of a part, from its first one to the first that is missing."""
    records: list[ShardRecord] = []
    while (path := _record_path(directory, shard_name(part, len(records)))).exists():
        values = json.loads(path.read_text(encoding="utf-8"))
        record = ShardRecord(**values | {"facts": ShardFacts(**values["facts"])})
        records.append(record)
        if record.is_last:
            break
    return records


def check_files(prefix: Path, documents: int, tokens: int, dtype_bytes: int) -> None:
    """Raises UserError if the `.bin`/`.idx` pair at `prefix` is not as large as its manifest implies."""
    if not documents:
        return
    bin_file, index_file = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    complete = bin_file.is_file() and index_file.is_file() and bin_file.stat().st_size == tokens * dtype_bytes
    if not complete:
        raise UserError(
            f"the files of {prefix} were changed after they were made: delete the folder {prefix.parent} and prepare "
            "the data again"
        )


def skipped_path(directory: Path, name: str) -> Path:
    """Rows left out of a shard of an unfinished dataset."""
    return directory / WORK_FOLDER / f"{name}.skipped.jsonl"


def _record_path(directory: Path, name: str) -> Path:
    return directory / WORK_FOLDER / f"{name}.json"
