"""Cutting a source into parts: units of work that are the same whoever does them, and in whatever order.

A plain .jsonl is cut at line ends into ranges of about `shard_bytes`, a parquet file between row groups, a saved
dataset by rows; each such part becomes one shard. A compressed .jsonl and a shard of a hub dataset can only be read
from the beginning: each is one part, whose worker starts a new shard after every `shard_bytes` of text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.prepare.inputs import InputFile, is_saved_dataset, list_input_files
from data_pipeline.prepare.readers import check_first_line, skip_line


@dataclass(frozen=True)
class Part:
    """A unit of work.

    number: place in the source. reader: jsonl, stream, parquet, saved or hub (see readers.py).
    name: of the input in manifests. path: of the input in error messages.
    start, end: bytes (jsonl), row groups (parquet), rows (saved); start of a hub part: the number of its hub shard.
    first_row: number of the part's first row in its input; None where only counting the lines before would tell.
    size: what it counts for in the progress bar, in bytes; 0 if unknown.
    options: what else the reader needs.
    """

    number: int
    reader: str
    name: str
    path: str
    start: int
    end: int
    first_row: int | None
    size: int
    options: dict[str, Any]

    @property
    def is_stream(self) -> bool:
        """Whether it can only be read from the beginning, and may become several shards."""
        return self.reader in ("stream", "hub")


@dataclass(frozen=True)
class Plan:
    """parts: in order. inputs: {name, bytes, sample_sha256} of every input, which identify the content.

    empty_inputs: paths of files without a byte.
    """

    parts: list[Part]
    inputs: list[dict[str, Any]]
    empty_inputs: list[str]


def build_plan(input_: Any, column: str, shard_bytes: int) -> Plan:
    """Plan of a source's `conf.schema.InputConfig`.

    Raises UserError: what list_input_files raises, a column that the data do not have, a file that is not what its
    name says, a dataset that cannot be loaded.
    """
    if input_.dataset is not None:
        from data_pipeline.prepare.hub import plan_hub

        inputs, parts = plan_hub(input_, column)
        return _number(parts, inputs, [])
    path = Path(input_.files).expanduser()
    if is_saved_dataset(path):
        from data_pipeline.prepare.saved import plan_saved

        inputs, parts = plan_saved(path, input_.split, column, shard_bytes)
        return _number(parts, inputs, [])
    files = list_input_files(input_.files)
    parts = [part for file in files if file.size for part in _plan_file(file, column, shard_bytes)]
    described = [{"name": f.name, "bytes": f.size, "sample_sha256": f.sample_sha256} for f in files]
    return _number(parts, described, [str(file.path) for file in files if not file.size])


def _number(parts: list[dict[str, Any]], inputs: list[dict[str, Any]], empty: list[str]) -> Plan:
    return Plan([Part(number=i, **part) for i, part in enumerate(parts)], inputs, empty)


def _plan_file(file: InputFile, column: str, shard_bytes: int) -> Iterator[dict[str, Any]]:
    common = {"name": file.name, "path": str(file.path), "options": {}}
    if file.suffix == ".parquet":
        yield from _plan_parquet(file, column, shard_bytes, common)
        return
    check_first_line(file.path, column)
    if file.suffix != ".jsonl":
        yield common | {"reader": "stream", "start": 0, "end": file.size, "first_row": 0, "size": file.size}
        return
    for start, end in cut_lines(file.path, file.size, shard_bytes):
        first_row = 0 if start == 0 else None
        yield common | {"reader": "jsonl", "start": start, "end": end, "first_row": first_row, "size": end - start}


def cut_lines(path: Path, size: int, shard_bytes: int) -> Iterator[tuple[int, int]]:
    """Byte ranges [start, end) of at least `shard_bytes` (the last one: of the rest) that end at line ends."""
    start = 0
    with open(path, "rb") as file:
        while start < size:
            end = min(start + shard_bytes, size)
            file.seek(end - 1)
            skip_line(file)  # the rest of the one that the byte before `end` is on
            end = min(file.tell(), size)
            yield start, end
            start = end


def _plan_parquet(file: InputFile, column: str, shard_bytes: int, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from data_pipeline.prepare.parquet import list_row_groups

    first_row = 0
    start, rows, size = 0, 0, 0
    groups = list_row_groups(file.path, column)
    for number, (group_rows, group_bytes) in enumerate(groups):
        rows, size = rows + group_rows, size + group_bytes
        if size >= shard_bytes or number == len(groups) - 1:
            yield common | {
                "reader": "parquet",
                "start": start,
                "end": number + 1,
                "first_row": first_row,
                "size": size,
            }
            start, first_row, rows, size = number + 1, first_row + rows, 0, 0
