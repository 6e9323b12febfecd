"""Finish a dataset: turn the notes on its shards into manifests, and the records left out into one list."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from conf.system.atomic import PARTIAL_SUFFIX, atomic_file
from conf.system.errors import UserError
from data_pipeline.prepare.identity import PLAN_NAME
from data_pipeline.prepare.image_sharing import share_images
from data_pipeline.prepare.part import Part
from data_pipeline.prepare.shards import WORK_FOLDER, CompleteShard, load_complete_shards, skipped_path
from data_pipeline.prepare.writer import writing
from data_pipeline.storage.manifest import MANIFEST_NAME, ShardManifest, save_shard_manifest

SKIPPED_NAME = "skipped.jsonl"
NUM_EXAMPLES = 5
LINE_READERS = ("jsonl", "stream")
# Temporary names of what prepare writes; others, such as trainings, may be writing to the folder.
LEFTOVERS = [f".{name}.*{PARTIAL_SUFFIX}" for name in ("shard_*", PLAN_NAME, MANIFEST_NAME, SKIPPED_NAME)]


@dataclass(frozen=True)
class LocatedShard:
    """Holds a complete shard and its place in the input. offset: number of the part's first record there."""

    part: Part
    shard: CompleteShard
    offset: int


def locate_shards(directory: Path, parts: list[Part]) -> list[LocatedShard]:
    """Return the shards of a source whose parts are all done, in order."""
    located: list[LocatedShard] = []
    records_before: Counter[str] = Counter()  # in parts of the same input
    for part in parts:
        complete = load_complete_shards(directory, part.number)
        offset = records_before[part.path] if part.first_record is None else part.first_record
        located += [LocatedShard(part, shard, offset) for shard in complete]
        records_before[part.path] = offset + complete[-1].end_record
    return located


def write_shard_manifests(directory: Path, located: list[LocatedShard]) -> tuple[ShardManifest, ...]:
    """Write the `.json` of every shard that has a document, and return them in order."""
    complete = share_images(directory, [item.shard for item in located])
    used = [replace(item, shard=shard) for item, shard in zip(located, complete, strict=True)]
    manifests = tuple(_manifest(item) for item in used if item.shard.contents.documents)
    for manifest in manifests:
        save_shard_manifest(directory / manifest.name, manifest)
    return manifests


def write_skipped(directory: Path, located: list[LocatedShard]) -> Path | None:
    """Write skipped.jsonl, one line per record left out: file, line (or `row`, from 0), reason and detail, in order.

    Returns its path, or None where no record was left out.
    """
    path = directory / SKIPPED_NAME
    if not any(item.shard.skipped for item in located):
        return None
    with writing(path), atomic_file(path) as file:
        file.writelines(orjson.dumps(line) + b"\n" for line in _skipped_lines(directory, located))
    return path


def refuse_skipped(skipped: int, records: int, max_share: float, path: Path) -> None:
    """Raise UserError if more than `max_share` of the records were left out. path: of the list of them."""
    if skipped <= max_share * records:
        return
    with open(path, encoding="utf-8") as file:
        lines = "".join(f"\n  {_describe(json.loads(line))}" for line in islice(file, NUM_EXAMPLES))
    raise UserError(
        f"{skipped} of {records} records are unusable, more than data.prepare.max_skipped_share={max_share:g}: correct "
        f"the input, or raise the share to leave them out. All are listed in {path}. The first:{lines}"
    )


def remove_leftovers(directory: Path, keep_notes: bool) -> None:
    """Delete what killed runs left under temporary names, and the notes on shards unless they are still needed."""
    if not keep_notes:
        shutil.rmtree(directory / WORK_FOLDER, ignore_errors=True)
    for pattern in [*LEFTOVERS, f"{WORK_FOLDER}/.*"]:
        for path in directory.glob(pattern):
            with suppress(OSError):  # a finished dataset may be on a disk that cannot be written
                path.unlink()


def _manifest(item: LocatedShard) -> ShardManifest:
    shard = item.shard
    return ShardManifest(
        name=shard.name,
        **vars(shard.contents),
        input=item.part.name,
        first_record=item.offset + shard.first_record,
        end_record=item.offset + shard.end_record,
        skipped=shard.skipped,
    )


def _skipped_lines(directory: Path, located: list[LocatedShard]) -> Iterator[dict[str, Any]]:
    for item in located:
        if not item.shard.skipped:
            continue
        with open(skipped_path(directory, item.shard.name), "rb") as file:
            for line in file:
                values = orjson.loads(line)
                number = item.offset + values.pop("row")
                is_line = item.part.reader in LINE_READERS
                place = {"line": number + 1} if is_line else {"row": number}
                yield {"file": values.pop("file")} | place | values


def _describe(line: dict[str, Any]) -> str:
    place = f"{line['file']}:{line['line']}" if "line" in line else f"{line['file']}, record {line['row']}"
    return f"{place}: {line['reason']}" + (f" ({line['detail']})" if line["detail"] else "")
