"""Define what the readers of all formats share: a part of a source, which records are wanted, and a batch of them.

A record's number counts from 0 within its part. In .jsonl it is the number of the line; a blank line has a number but
is no record.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

LARGEST_BATCH_RECORDS = 1024


@dataclass(frozen=True)
class Part:
    """Describes a unit of work: a stretch of one input that one worker reads from beginning to end.

    reader: jsonl, stream, parquet, saved or hub (see plan.py).
    name: of the input in manifests. path: of the input in error messages.
    start, end: bytes (jsonl), row groups (parquet), records (saved); start of a hub part: the number of its hub shard.
    first_record: number of the part's first record in its input; None where only counting the lines before would tell.
    size: what it counts for in the progress bar, in bytes; 0 if unknown.
    options: what else the reader needs. number: place in the source, counted by plan_source.
    """

    reader: str
    name: str
    path: str
    start: int
    end: int
    first_record: int | None
    size: int
    options: dict[str, Any]
    number: int = 0

    @property
    def is_stream(self) -> bool:
        """Return whether the part can only be read from its beginning, and may become several shards."""
        return self.reader in ("stream", "hub")


@dataclass(frozen=True)
class SourcePlan:
    """Holds the parts of a source, in order, and what identifies its content.

    inputs: {name, bytes, sample_sha256} of every input; of the hub's files the name alone, which holds the commit.
    empty_inputs: paths of files without a byte.
    """

    parts: list[Part]
    inputs: list[dict[str, Any]]
    empty_inputs: list[str]


@dataclass(frozen=True)
class Selection:
    """Chooses the records to take: all, heldout (about one in `every`) or train (the others); see conf.schema.Split.

    The hash of a record's content decides: so neither the name of its file nor the records before it matter, and copies
    of a document are never on both sides.
    """

    records: str
    every: int

    def takes(self, content: bytes) -> bool:
        """Return whether the record with this content is taken."""
        if self.records == "all":
            return True
        number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
        return (number % self.every == 0) == (self.records == "heldout")

    def takes_value(self, value: object) -> bool:
        """Return whether a record that is known by its column's content alone is taken."""
        return self.records == "all" or self.takes(repr(value).encode())


@dataclass(frozen=True)
class Wanted:
    """Says what to read of a part. batch_bytes: about as much text as is read before it is encoded."""

    column: str
    selection: Selection
    batch_bytes: int


@dataclass
class RecordBatch:
    """Holds neighbouring records of a part.

    numbers, values: of the records taken; a value is the column's content, or Skip where there is none.
    end: number of the record after the last one read. text_bytes: read, taken or not. progress: of Part.size.
    """

    numbers: list[int]
    values: list[Any]
    end: int
    text_bytes: int
    progress: int


def build_batch(values: list[Any], start: int, selection: Selection, bytes_per_record: int) -> RecordBatch:
    """Return the batch of the records of a part that begin with number `start`, of which `selection` takes some."""
    taken = [i for i, value in enumerate(values) if selection.takes_value(value)]
    size = len(values) * bytes_per_record
    return RecordBatch([start + i for i in taken], [values[i] for i in taken], start + len(values), size, size)
