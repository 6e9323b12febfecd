"""From the records of all shards to what a finished dataset says of itself."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from conf.system.atomic import PARTIAL_SUFFIX, atomic_file
from conf.system.errors import UserError
from data_pipeline.prepare.identity import PLAN_NAME
from data_pipeline.prepare.plan import Part
from data_pipeline.prepare.shards import WORK_FOLDER, ShardRecord, load_records, skipped_path
from data_pipeline.prepare.writer import writing
from data_pipeline.storage.manifest import MANIFEST_NAME, ShardManifest, save_shard_manifest

SKIPPED_NAME = "skipped.jsonl"
NUM_EXAMPLES = 5
LINE_READERS = ("jsonl", "stream")
# Temporary names of what prepare writes; others, such as trainings, may be writing to the folder.
LEFTOVERS = [f".{name}.*{PARTIAL_SUFFIX}" for name in ("shard_*", PLAN_NAME, MANIFEST_NAME, SKIPPED_NAME)]


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
    with writing(path), atomic_file(path) as file:
        file.writelines(orjson.dumps(row) + b"\n" for row in _skipped_rows(directory, shards))
    return path


def refuse_skipped(skipped: int, rows: int, max_share: float, path: Path) -> None:
    """Raises UserError if more than `max_share` of the rows were left out. path: of the list of them."""
    if skipped <= max_share * rows:
        return
    with open(path, encoding="utf-8") as file:
        lines = "".join(f"\n  {_describe(json.loads(line))}" for line in islice(file, NUM_EXAMPLES))
    raise UserError(
        f"{skipped} of {rows} rows are unusable, more than data.prepare.max_skipped_share={max_share:g}: mend the "
        f"input, or raise the share to leave them out. All are in {path}. The first:{lines}"
    )


def remove_leftovers(directory: Path, keep_records: bool) -> None:
    """Delete what runs that were killed left under temporary names, and the records unless they are still needed."""
    if not keep_records:
        shutil.rmtree(directory / WORK_FOLDER, ignore_errors=True)
    for pattern in [*LEFTOVERS, f"{WORK_FOLDER}/.*"]:
        for path in directory.glob(pattern):
            with suppress(OSError):  # a finished dataset may be on a disk that cannot be written
                path.unlink()


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
