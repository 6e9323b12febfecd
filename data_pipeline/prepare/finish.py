"""From the records of all shards to what a finished dataset says of itself."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from conf.atomic import partial_path
from data_pipeline.manifest import ShardManifest, save_shard_manifest
from data_pipeline.prepare.plan import Part
from data_pipeline.prepare.readers import count_lines
from data_pipeline.prepare.shards import NUM_EXAMPLES, WORK_FOLDER, ShardRecord, load_records, skipped_path
from data_pipeline.prepare.writer import writing

SKIPPED_NAME = "skipped.jsonl"
LINE_READERS = ("jsonl", "stream")


@dataclass(frozen=True)
class FinishedShard:
    """A record with what only the parts before it tell. offset: number of the part's first row in its input."""

    part: Part
    record: ShardRecord
    offset: int


def locate_shards(directory: Path, parts: list[Part]) -> list[FinishedShard]:
    """The shards of a source whose parts are all done, in order."""
    shards: list[FinishedShard] = []
    rows_before: Counter[str] = Counter()  # in parts of the same input
    for part in parts:
        records = load_records(directory, part.number)
        offset = rows_before[part.path] if part.first_row is None else part.first_row
        shards += [FinishedShard(part, record, offset) for record in records]
        rows_before[part.path] = offset + records[-1].end_row
    return shards


def write_shard_manifests(directory: Path, shards: list[FinishedShard]) -> tuple[ShardManifest, ...]:
    """Write the `.json` of every shard that has a document, and return them in order."""
    manifests = tuple(_manifest(shard) for shard in shards if shard.record.facts.documents)
    for manifest in manifests:
        save_shard_manifest(directory / manifest.name, manifest)
    return manifests


def write_skipped(directory: Path, shards: list[FinishedShard]) -> Path | None:
    """Write skipped.jsonl, one line per row left out: file, line (or row, from 0), reason and detail, in order.

    Returns its path, or None where no row was left out.
    """
    path = directory / SKIPPED_NAME
    if not any(shard.record.skipped for shard in shards):
        return None
    temporary = partial_path(path)
    with writing(temporary):
        with open(temporary, "wb") as file:
            file.writelines(orjson.dumps(row) + b"\n" for row in _skipped_rows(directory, shards))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return path


def first_skipped(path: Path) -> list[str]:
    """`file:line: reason` of the first rows of skipped.jsonl."""
    with open(path, encoding="utf-8") as file:
        return [_describe(json.loads(line)) for line in islice(file, NUM_EXAMPLES)]


def locate_row(part: Part, row: int, reason: str) -> str:
    """`file:line: reason` of a row of a part; reads what lies before it in the file, so for errors only."""
    if part.reader not in LINE_READERS:
        return f"{part.path}, row {(part.first_row or 0) + row}: {reason}"
    before = count_lines(part.path, 0, part.start) if part.first_row is None else part.first_row
    return f"{part.path}:{before + row + 1}: {reason}"


def remove_leftovers(directory: Path, keep_records: bool) -> None:
    """Delete what runs that were killed left under temporary names, and the records unless they are still needed."""
    if not keep_records:
        shutil.rmtree(directory / WORK_FOLDER, ignore_errors=True)
    for path in [*directory.glob(".*.partial"), *directory.glob("*.partial"), *directory.glob(f"{WORK_FOLDER}/.*")]:
        path.unlink(missing_ok=True)


def _manifest(shard: FinishedShard) -> ShardManifest:
    record = shard.record
    return ShardManifest(
        name=record.name,
        **asdict(record.facts),
        input=shard.part.name,
        first_row=shard.offset + record.first_row,
        end_row=shard.offset + record.end_row,
        skipped=record.skipped,
    )


def _skipped_rows(directory: Path, shards: list[FinishedShard]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        if not shard.record.skipped:
            continue
        with open(skipped_path(directory, shard.record.name), "rb") as file:
            for line in file:
                row = orjson.loads(line)
                number = shard.offset + row.pop("row")
                is_line = shard.part.reader in LINE_READERS
                place = {"line": number + 1} if is_line else {"row": number}
                yield {"file": row.pop("file")} | place | row


def _describe(row: dict[str, Any]) -> str:
    place = f"{row['file']}:{row['line']}" if "line" in row else f"{row['file']}, row {row['row']}"
    return f"{place}: {row['reason']}" + (f" ({row['detail']})" if row["detail"] else "")
