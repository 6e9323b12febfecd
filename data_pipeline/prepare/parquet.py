"""Read parquet files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from conf.system.errors import UserError
from data_pipeline.encoder import Skip
from data_pipeline.prepare.inputs import InputFile
from data_pipeline.prepare.part import Part, RecordBatch, Wanted, build_batch, drop_nulls

READ_CHUNK_BYTES = 1 << 20


def list_row_groups(path: Path, column: str, images: str | None = None) -> list[tuple[int, int]]:
    """Return (records, uncompressed bytes of `column` and `images`) of every row group.

    images: a column that need not be there. Raises UserError without a column `column`.
    """
    with _open(path) as file:
        columns = list(file.schema_arrow.names)
        if column not in columns:
            raise UserError(f"{path} has no column {column!r} but {', '.join(columns) or 'none'}: set input.column")
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        return [(group.num_rows, _column_bytes(group, (column, images))) for group in groups]


def plan_row_groups(file: InputFile, column: str, shard_bytes: int, images: str | None = None) -> Iterator[Part]:
    """Yield the parts of a parquet file, of at least `shard_bytes` each but the last. Raises as list_row_groups."""
    first_record = 0
    start, records, size = 0, 0, 0
    groups = list_row_groups(file.path, column, images)
    for number, (group_records, group_bytes) in enumerate(groups):
        records, size = records + group_records, size + group_bytes
        if size >= shard_bytes or number == len(groups) - 1:
            yield Part(
                reader="parquet",
                name=file.name,
                path=str(file.path),
                start=start,
                end=number + 1,
                first_record=first_record,
                size=size,
                options={},
            )
            start, first_record, records, size = number + 1, first_record + records, 0, 0


def read_row_groups(part: Part, wanted: Wanted) -> Iterator[RecordBatch]:
    """Yield the records of row groups [part.start, part.end)."""
    end = 0
    with _open(Path(part.path)) as file:
        groups, columns = list(range(part.start, part.end)), wanted_columns(file.schema_arrow.names, wanted)
        num_records = sum(file.metadata.row_group(i).num_rows for i in groups)
        bytes_per_record = max(1, part.size // max(1, num_records))
        batch_records = max(1, min(wanted.batch_records, wanted.batch_bytes // bytes_per_record))
        try:
            for batch in file.iter_batches(batch_records, row_groups=groups, columns=columns):
                values = batch_values(batch, wanted)
                yield build_batch(values, end, wanted.selection, bytes_per_record)
                end += len(values)
        except pa.ArrowException as error:
            raise _damaged(Path(part.path), error) from error


def wanted_columns(names: list[str], wanted: Wanted) -> list[str]:
    """Return the columns to read of those in a file: that of the values, and those beside it that are there."""
    return [name for name in (wanted.column, *wanted.beside.values()) if name in names]


def batch_values(table: Any, wanted: Wanted) -> list[Any]:
    """Return the values of an Arrow table or batch; Skip where a string is not UTF-8."""
    values = _column_values(table.column(wanted.column))
    there = {key: name for key, name in wanted.beside.items() if name in table.schema.names}
    beside = [_column_values(table.column(name)) for name in there.values()]
    of_records = zip(*beside, strict=True) if beside else ((),) * len(values)
    return [
        wanted.combine(value, dict(zip(there, items, strict=True)))
        for value, items in zip(values, of_records, strict=True)
    ]


def _column_values(array: Any) -> list[Any]:
    """Return the Python values of an Arrow array, without the members of structs that are null."""
    try:
        return [drop_nulls(value) for value in array.to_pylist()]
    except UnicodeDecodeError:
        return [drop_nulls(_value(scalar)) for scalar in array]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as broken:
        return Skip("invalid UTF-8", f"byte {broken.start + 1} of the text")


def _column_bytes(group: Any, names: tuple[str | None, ...]) -> int:
    """Return the bytes of columns; of a nested one, those of all it contains."""
    chunks = (group.column(i) for i in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in names)


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=READ_CHUNK_BYTES, pre_buffer=False)
    except pa.ArrowException as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or no parquet file: {error}")
