"""Rows of a part, in batches of bounded size. Imported by worker processes: no torch, no configuration libraries.

A row's number counts from 0 within its part. In .jsonl it is the number of the line; a blank line has a number and is
no row.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import zstandard

from conf.errors import UserError
from data_pipeline.prepare.encoders import Skip

if TYPE_CHECKING:
    from data_pipeline.prepare.plan import Part

COUNT_PIECE_BYTES = 1 << 22
READ_PIECE_BYTES = 1 << 18
COMPRESSED_PIECE_BYTES = 1 << 14  # what is decompressed at once; small, because it may expand a lot
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BROKEN_STREAM = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)


@dataclass(frozen=True)
class Wanted:
    """What to read of a part. batch_bytes: of text, about as much as is read before it is encoded."""

    column: str
    selection: "Selection"
    batch_bytes: int


@dataclass(frozen=True)
class Selection:
    """Rows to take. rows: all, heldout (every `every`-th) or train (the others); see conf.schema.Split."""

    rows: str
    every: int

    def takes(self, number: int) -> bool:
        """Whether the row with this number in its input is taken."""
        return self.rows == "all" or (number % self.every == self.every - 1) == (self.rows == "heldout")


@dataclass
class RowBatch:
    """Rows of a part that come one after another.

    numbers, values: of the rows taken; a value is the column's content, or Skip where there is none.
    end: number of the row after the last one read. text_bytes: read, taken or not. progress: of Part.size.
    """

    numbers: list[int]
    values: list[Any]
    end: int
    text_bytes: int
    progress: int


def read_rows(part: "Part", wanted: Wanted, first_row: int, skip: int) -> Iterator[RowBatch]:
    """Batches of the rows of `part` from number `skip` on. first_row: the part's first row in its input.

    Raises UserError naming the input if it cannot be read or is not what its name says.
    """
    with reading(part.path):
        yield from _read(part, wanted, first_row, skip)


def _read(part: "Part", wanted: Wanted, first_row: int, skip: int) -> Iterator[RowBatch]:
    if part.reader == "jsonl":
        return _read_range(part, wanted, first_row)
    if part.reader == "stream":
        return _read_stream(part, wanted, skip)
    if part.reader == "parquet":
        from data_pipeline.prepare.parquet import read_row_groups

        return read_row_groups(part, wanted)
    if part.reader == "saved":
        from data_pipeline.prepare.saved import read_saved

        return read_saved(part, wanted)
    from data_pipeline.prepare.hub import read_hub

    return read_hub(part, wanted, skip)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns errors of files and of decompression into UserError that names `path`."""
    try:
        yield
    except BROKEN_STREAM as error:
        raise UserError(f"{path} is damaged or was cut off: {error}; fetch it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def open_lines(path: str | Path) -> tuple[io.BufferedReader, Any]:
    """The decompressed file, and the raw one (whose position is the progress)."""
    raw = open(path, "rb")  # noqa: SIM115 (closed with the reader that owns it)
    name = str(path)
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), READ_PIECE_BYTES), raw  # type: ignore[arg-type]
    if name.endswith(".zst"):
        return io.BufferedReader(ZstdFile(raw), READ_PIECE_BYTES), raw
    return raw, raw


def check_first_line(path: Path, column: str) -> None:
    """Raises UserError if the first row of a .jsonl file, compressed or not, is an object without `column`."""
    with reading(path):
        file, raw = open_lines(path)
        with raw, file:
            first = next((line for line in file if not line.isspace()), b"")
    try:
        row = orjson.loads(first.removeprefix(BYTE_ORDER_MARK))
    except orjson.JSONDecodeError:
        return  # counted like any other broken line
    if isinstance(row, dict) and column not in row:
        raise UserError(f"{path} has no column {column!r} but {', '.join(row) or 'none'}: set input.column")


def count_lines(path: str, start: int, end: int) -> int:
    """Line ends in bytes [start, end) of a file. Raises UserError if it cannot be read."""
    count = 0
    with reading(path), open(path, "rb") as file:
        file.seek(start)
        while start < end and (piece := file.read(min(COUNT_PIECE_BYTES, end - start))):
            count += piece.count(b"\n")
            start += len(piece)
    return count


def parse_line(line: bytes, column: str) -> Any:
    """Content of `column` in one line of JSON, or why there is none."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return _explain_broken(line, error)
    if not isinstance(row, dict):
        return Skip("row is no JSON object", f"but {type(row).__name__}")
    if column not in row:
        return Skip(f"no column {column!r}", f"but {', '.join(row) or 'none'}"[:200])
    return row[column]


def _explain_broken(line: bytes, error: orjson.JSONDecodeError) -> Skip:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as broken:
        return Skip("invalid UTF-8", f"byte {broken.start + 1} of the line")
    return Skip("broken JSON", f"{error.msg}, character {error.pos + 1}")


def _read_range(part: "Part", wanted: Wanted, first_row: int) -> Iterator[RowBatch]:
    """Lines of bytes [part.start, part.end), which begin and end at line ends."""
    remaining, end = part.end - part.start, 0
    with open(part.path, "rb") as file:
        file.seek(part.start)
        while lines := _next_lines(file, remaining, wanted.batch_bytes):
            text_bytes = sum(map(len, lines))
            if part.start == 0 and end == 0:
                lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
            remaining = part.end - file.tell()
            batch = _parse_lines(lines, wanted, end, first_row)
            end = batch.end
            batch.text_bytes = batch.progress = text_bytes
            yield batch
    if remaining:
        raise UserError(f"{part.path} became shorter while it was read: prepare it when nobody writes to it")


def _next_lines(file: io.BufferedReader, remaining: int, batch_bytes: int) -> list[bytes]:
    """Whole lines of about `batch_bytes`, none of them beyond the next `remaining` bytes, which end with a line."""
    if remaining <= 1:
        return [file.readline()] if remaining else []
    # readlines stops after the line with which it has read more than it was told; 0 would mean everything.
    return file.readlines(min(batch_bytes, remaining - 1))


def _read_stream(part: "Part", wanted: Wanted, skip: int) -> Iterator[RowBatch]:
    """Lines of a compressed file; the first `skip` are only decompressed."""
    file, raw = open_lines(part.path)
    with raw, file:
        for _ in range(skip):
            file.readline()
        end, position = skip, raw.tell()
        while lines := file.readlines(wanted.batch_bytes):
            if end == 0:
                lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
            batch = _parse_lines(lines, wanted, end, 0)
            end = batch.end
            batch.text_bytes = sum(map(len, lines))
            batch.progress, position = raw.tell() - position, raw.tell()
            yield batch


def _parse_lines(lines: list[bytes], wanted: Wanted, start: int, first_row: int) -> RowBatch:
    """Batch of lines whose numbers in the part begin with `start`; sizes are left to the caller."""
    taken = [
        (number, line)
        for number, line in enumerate(lines, start)
        if wanted.selection.takes(first_row + number) and not line.isspace()
    ]
    values = [parse_line(line, wanted.column) for _, line in taken]
    return RowBatch([number for number, _ in taken], values, start + len(lines), 0, 0)


class ZstdFile(io.RawIOBase):
    """Decompressed bytes of a .zst file, frame after frame; one that was cut off is an error, not its end."""

    def __init__(self, raw: io.BufferedReader) -> None:
        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """See io.RawIOBase. Raises EOFError if the file ends within a frame, ZstdError if it is damaged."""
        while not self._ready:
            piece = self._raw.read(COMPRESSED_PIECE_BYTES)
            if not piece:
                if self._frame is not None:
                    raise EOFError("the file ends within a compressed frame")
                return 0
            self._ready = memoryview(b"".join(self._decompress(piece)))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, piece: bytes) -> Iterator[bytes]:
        while piece:
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            yield self._frame.decompress(piece)
            piece = b""
            if self._frame.eof:
                piece = self._frame.unused_data
                self._frame = None
