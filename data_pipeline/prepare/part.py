"""Define what the readers of all formats share: a part of a source, which records are wanted, and a batch of them.

A record's number counts from 0 within its part. In .jsonl it is the number of the line; a blank line has a number but
is no record.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import orjson

from data_pipeline.encoder import Skip

LARGEST_BATCH_RECORDS = 1024
LARGEST_PICTURED_BATCH_RECORDS = 16  # their pictures may be in the file, and one has megabytes
TOOLS_COLUMN = "tools"  # of chats: what the assistant may call, beside the messages
IMAGES_KEY = "images"  # of a value with pictures beside the messages
# The rule by which Selection splits. By the first one, copies in a .jsonl that differed in other columns were apart.
SELECTION_VERSION = 2


@dataclass(frozen=True)
class Part:
    """Describes a unit of work: a stretch of one input that one worker reads from beginning to end.

    reader: jsonl, stream, parquet, saved, tar or hub (see plan.py).
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
        return self.reader in ("stream", "hub", "tar")


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

    The hash of what is trained on decides: so neither the name or format of its file nor other columns or records
    matter, and copies of a document are never on both sides.
    """

    records: str
    every: int

    def takes(self, value: object) -> bool:
        """Return whether the record with this content of its column is taken."""
        if self.records == "all":
            return True
        number = int.from_bytes(hashlib.blake2b(_identify(value), digest_size=8).digest())
        return (number % self.every == 0) == (self.records == "heldout")


def _identify(value: object) -> bytes:
    """Return bytes that are the same for the same text or chat, in whatever format and order of keys it was stored."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, Skip):
        return str(value).encode("utf-8", "surrogatepass")
    if isinstance(value, dict) and "messages" in value:
        value = [value["messages"], value.get(TOOLS_COLUMN)] if value.get(TOOLS_COLUMN) else value["messages"]
    try:
        return orjson.dumps(drop_nulls(value), option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError:  # half a character, or a kind of value that is no chat: encoders will say so
        return repr(value).encode("utf-8", "surrogatepass")


def drop_nulls(value: Any) -> Any:
    """Return a value without members that are null: columnar files give every struct the members of all."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value


def count_value_bytes(value: Any) -> int:
    """Return about how many bytes a value has: those of all texts and files in it."""
    if isinstance(value, dict):
        return sum(map(count_value_bytes, value.values()))
    if isinstance(value, list):
        return sum(map(count_value_bytes, value))
    return len(value) if isinstance(value, str | bytes) else 0


@dataclass(frozen=True)
class Wanted:
    """Says what to read of a part.

    column: of the text or the messages. batch_bytes: about as much text as is read before it is encoded.
    tools_column: of the tools beside messages, where a record has it; null for texts.
    images_column: of the pictures beside messages, where a record has it; null where there are no images.
    """

    column: str
    selection: Selection
    batch_bytes: int
    tools_column: str | None = None
    images_column: str | None = None

    @property
    def beside(self) -> dict[str, str]:
        """Return the columns that go with a record's own, by their key in its value."""
        columns = {TOOLS_COLUMN: self.tools_column, IMAGES_KEY: self.images_column}
        return {key: column for key, column in columns.items() if column is not None}

    @property
    def batch_records(self) -> int:
        """Return the most records to read at once."""
        return LARGEST_BATCH_RECORDS if self.images_column is None else LARGEST_PICTURED_BATCH_RECORDS

    def combine(self, value: Any, beside: dict[str, Any]) -> Any:
        """Return the value of a record: its column's content, with what it has beside it by key, if anything."""
        if isinstance(value, Skip):
            return value
        given = {key: item for key, item in beside.items() if item or (key == IMAGES_KEY and item is not None)}
        if not given and self.images_column is None:
            return value
        return given | (value if isinstance(value, dict) else {"messages": value})


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
    taken = [i for i, value in enumerate(values) if selection.takes(value)]
    size = len(values) * bytes_per_record
    return RecordBatch([start + i for i in taken], [values[i] for i in taken], start + len(values), size, size)
