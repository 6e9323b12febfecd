"""Rows of parquet files."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from conf.system.errors import UserError
from data_pipeline.prepare.encoders import Skip
from data_pipeline.prepare.readers import RowBatch, Selection, Wanted

if TYPE_CHECKING:
    from data_pipeline.prepare.plan import Part

LARGEST_BATCH_ROWS = 1024
READ_PIECE_BYTES = 1 << 20


def list_row_groups(path: Path, column: str) -> list[tuple[int, int]]:
    """(rows, uncompressed bytes of `column`) of every row group. Raises UserError if there is no such column."""
    with _open(path) as file:
        columns = list(file.schema_arrow.names)
        if column not in columns:
            raise UserError(f"{path} has no column {column!r} but {', '.join(columns) or 'none'}: set input.column")
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        return [(group.num_rows, _column_bytes(group, column)) for group in groups]


def read_row_groups(part: "Part", wanted: Wanted) -> Iterator[RowBatch]:
    """Rows of row groups [part.start, part.end)."""
    end = 0
    with _open(Path(part.path)) as file:
        groups = list(range(part.start, part.end))
        num_rows = sum(file.metadata.row_group(i).num_rows for i in groups)
        bytes_per_row = max(1, part.size // max(1, num_rows))
        batch_rows = max(1, min(LARGEST_BATCH_ROWS, wanted.batch_bytes // bytes_per_row))
        try:
            for batch in file.iter_batches(batch_rows, row_groups=groups, columns=[wanted.column]):
                values = column_values(batch.column(0))
                yield build_batch(values, end, wanted.selection, bytes_per_row)
                end += len(values)
        except pa.ArrowException as error:
            raise _damaged(Path(part.path), error) from error


def column_values(array: Any) -> list[Any]:
    """Python values of an Arrow array; Skip where a string is not UTF-8."""
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in array]


def build_batch(values: list[Any], start: int, selection: Selection, bytes_per_row: int) -> RowBatch:
    """Batch of the rows of a part that begin with number `start`."""
    taken = [i for i, value in enumerate(values) if selection.takes_value(value)]
    size = len(values) * bytes_per_row
    return RowBatch([start + i for i in taken], [values[i] for i in taken], start + len(values), size, size)


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as broken:
        return Skip("invalid UTF-8", f"byte {broken.start + 1} of the text")


def _column_bytes(group: Any, column: str) -> int:
    """Of a nested column, the bytes of all it contains."""
    chunks = (group.column(i) for i in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=READ_PIECE_BYTES, pre_buffer=False)
    except pa.ArrowException as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or no parquet file: {error}")
