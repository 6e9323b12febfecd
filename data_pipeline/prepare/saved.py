"""Read folders that `datasets` wrote with save_to_disk, memory-mapped."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_from_disk

from conf.system.errors import UserError
from data_pipeline.prepare.parquet import batch_values, wanted_columns
from data_pipeline.prepare.part import Part, RecordBatch, SourcePlan, Wanted, build_batch
from data_pipeline.storage.manifest import sample_sha256


def plan_saved(path: Path, split: str, column: str, shard_bytes: int) -> SourcePlan:
    """Return the parts and inputs of a saved dataset. Raises UserError: damaged, no such split or column."""
    dataset = _load(path, split)
    if column not in dataset.column_names:
        columns = ", ".join(dataset.column_names) or "none"
        raise UserError(f"{path} has no column {column!r} but {columns}: set input.column")
    files = [Path(file["filename"]) for file in dataset.cache_files]
    sizes = [file.stat().st_size for file in files]
    inputs = [
        {"name": file.name, "bytes": size, "sample_sha256": sample_sha256(file, size)}
        for file, size in zip(files, sizes, strict=True)
    ]
    bytes_per_record = max(1, sum(sizes) // max(1, len(dataset)))
    step = max(1, shard_bytes // bytes_per_record)
    parts = [
        Part(
            reader="saved",
            name=path.name if dataset.split is None else f"{path.name}/{split}",
            path=str(path),
            start=start,
            end=min(start + step, len(dataset)),
            first_record=start,
            size=bytes_per_record * (min(start + step, len(dataset)) - start),
            options={"split": split},
        )
        for start in range(0, len(dataset), step)
    ]
    return SourcePlan(parts, inputs, [])


def read_saved(part: Part, wanted: Wanted) -> Iterator[RecordBatch]:
    """Yield records [part.start, part.end)."""
    loaded = _load(Path(part.path), part.options["split"])
    dataset = loaded.select_columns(wanted_columns(loaded.column_names, wanted)).with_format("arrow")
    bytes_per_record = max(1, part.size // max(1, part.end - part.start))
    batch_records = max(1, min(wanted.batch_records, wanted.batch_bytes // bytes_per_record))
    for start in range(part.start, part.end, batch_records):
        values = _read_values(dataset, start, min(start + batch_records, part.end), wanted, part.path)
        yield build_batch(values, start - part.start, wanted.selection, bytes_per_record)


def _read_values(dataset: Dataset, start: int, end: int, wanted: Wanted, path: str) -> list[Any]:
    try:
        table: Any = dataset[start:end]
    except Exception as error:  # as _load
        raise UserError(f"{path}, record {start}: cannot be read: {error}") from error
    return batch_values(table, wanted)


def _load(path: Path, split: str) -> Dataset:
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds
        raise UserError(f"{path} is not a dataset that `datasets` can load: {error}") from error
    if not isinstance(loaded, DatasetDict):
        return loaded
    if split not in loaded:
        raise UserError(f"{path} has no split {split!r} but {', '.join(map(str, loaded))}: set input.split")
    return loaded[split]
