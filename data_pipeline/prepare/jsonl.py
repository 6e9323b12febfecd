"""Read .jsonl files, plain or compressed. Imported by worker processes: no torch, no configuration libraries."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import zstandard

from conf.system.errors import UserError
from data_pipeline.encoder import Skip
from data_pipeline.prepare.inputs import InputFile
from data_pipeline.prepare.part import Part, RecordBatch, Wanted

READ_CHUNK_BYTES = 1 << 18
COMPRESSED_CHUNK_BYTES = 1 << 14  # what is decompressed at once; small, because it may expand a lot
LARGEST_LINE_BYTES = 1 << 28  # a document of this size is a mistake, and would be held in memory
LARGEST_WINDOW_BYTES = 1 << 31  # of zstandard: what `zstd --ultra --long=31` writes
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BROKEN_STREAM = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn errors of files and of decompression into UserError that names `path`."""
    try:
        yield
    except BROKEN_STREAM as error:
        raise UserError(f"{path} is damaged or was cut off: {error}; fetch it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def open_lines(path: str | Path) -> tuple[io.BufferedReader, Any]:
    """Open a file decompressed, and raw (whose position is the progress)."""
    raw = open(path, "rb")  # noqa: SIM115 (closed with the reader that owns it)
    name = str(path)
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), READ_CHUNK_BYTES), raw  # type: ignore[arg-type]
    if name.endswith(".zst"):
        return io.BufferedReader(ZstdFile(raw), READ_CHUNK_BYTES), raw
    return raw, raw


def check_first_line(path: Path, column: str) -> None:
    """Raise UserError if the first record of a .jsonl file, compressed or not, is an object without `column`."""
    with reading(path):
        file, raw = open_lines(path)
        with raw, file:
            first = next((line for line in iter(partial(_read_line, file), b"") if not line.isspace()), b"")
    try:
        record = orjson.loads(first.removeprefix(BYTE_ORDER_MARK))
    except orjson.JSONDecodeError:
        return  # counted like any other broken line
    if isinstance(record, dict) and column not in record:
        raise UserError(f"{path} has no column {column!r} but {', '.join(record) or 'none'}: set input.column")


def plan_lines(file: InputFile, column: str, shard_bytes: int) -> Iterator[Part]:
    """Yield the parts of a .jsonl file: byte ranges of a plain one, the whole of a compressed one.

    Raises UserError if its first record lacks `column`.
    """
    check_first_line(file.path, column)
    is_plain = file.suffix == ".jsonl"
    for start, end in cut_lines(file.path, file.size, shard_bytes) if is_plain else [(0, file.size)]:
        yield Part(
            reader="jsonl" if is_plain else "stream",
            name=file.name,
            path=str(file.path),
            start=start,
            end=end,
            first_record=0 if start == 0 else None,
            size=end - start,
            options={},
        )


def cut_lines(path: Path, size: int, shard_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield byte ranges [start, end) of at least `shard_bytes` (the last one: of the rest) that end at line ends."""
    start = 0
    with open(path, "rb") as file:
        while start < size:
            end = min(start + shard_bytes, size)
            file.seek(end - 1)
            skip_line(file)  # the rest of the one that the byte before `end` is on
            end = min(file.tell(), size)
            yield start, end
            start = end


def parse_line(line: bytes, wanted: Wanted) -> Any:
    """Return the content of the wanted column in one line of JSON, with the tools beside it, or why there is none."""
    if len(line) > LARGEST_LINE_BYTES:
        return Skip("line too long", f"more than {LARGEST_LINE_BYTES} bytes")
    try:
        record, is_strict = orjson.loads(line), True
    except orjson.JSONDecodeError as error:
        record, is_strict = _parse_leniently(line, error), False
    if isinstance(record, Skip):
        return record
    if not isinstance(record, dict):
        return Skip("record is no JSON object", f"but {type(record).__name__}")
    if wanted.column not in record:
        return Skip(f"no column {wanted.column!r}", f"but {', '.join(record) or 'none'}"[:200])
    value = wanted.combine(record[wanted.column], {key: record.get(name) for key, name in wanted.beside.items()})
    return value if is_strict else _refuse_no_json(value, wanted.column)


def _parse_leniently(line: bytes, error: orjson.JSONDecodeError) -> Any:
    """Return a record with what Python's reader accepts although it is no JSON (NaN, half a character), or why not."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as broken:
        return Skip("invalid UTF-8", f"byte {broken.start + 1} of the line")
    except (ValueError, RecursionError):
        return Skip("broken JSON", f"{error.msg}, character {error.pos + 1}")


def _refuse_no_json(value: Any, column: str) -> Any:
    """Return the value, or why it cannot be used: other columns may hold what is no JSON, this one may not."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Skip("invalid UTF-8", f"half a character in column {column!r}")
    except ValueError:
        return Skip("broken JSON", f"column {column!r} holds a number that JSON does not have, such as NaN")
    return value


def skip_line(file: io.BufferedReader) -> None:
    """Read to the end of the line, without storing it."""
    while (chunk := file.readline(READ_CHUNK_BYTES)) and not chunk.endswith(b"\n"):
        pass


def _read_line(file: io.BufferedReader) -> bytes:
    """Return the next line; of one longer than LARGEST_LINE_BYTES one byte more than that, the rest is passed over."""
    line = file.readline(LARGEST_LINE_BYTES + 1)
    if len(line) > LARGEST_LINE_BYTES and not line.endswith(b"\n"):
        skip_line(file)
    return line


def _read_lines(file: io.BufferedReader, num_bytes: int) -> list[bytes]:
    """Return lines until they have `num_bytes` or one is too long."""
    lines: list[bytes] = []
    size = 0
    while size < num_bytes and (line := _read_line(file)):
        lines.append(line)
        size += len(line)
        if len(line) > LARGEST_LINE_BYTES:
            break
    return lines


def read_range(part: Part, wanted: Wanted) -> Iterator[RecordBatch]:
    """Yield the records of bytes [part.start, part.end), which begin and end at line ends."""
    position, end = part.start, 0
    with open(part.path, "rb") as file:
        file.seek(part.start)
        while lines := _read_lines(file, min(wanted.batch_bytes, part.end - position)):
            if position == 0:
                lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
            batch = _parse_lines(lines, wanted, end)
            end = batch.end
            batch.text_bytes = batch.progress = file.tell() - position
            position = file.tell()
            yield batch
    if position != part.end:
        raise UserError(f"{part.path} changed while it was read: prepare it when nobody writes to it")


def read_stream(part: Part, wanted: Wanted, skip: int) -> Iterator[RecordBatch]:
    """Yield the records of a compressed file; the first `skip` lines are only decompressed."""
    file, raw = open_lines(part.path)
    with raw, file:
        for _ in range(skip):
            skip_line(file)
        end, position = skip, raw.tell()
        while lines := _read_lines(file, wanted.batch_bytes):
            if end == 0:
                lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
            batch = _parse_lines(lines, wanted, end)
            end = batch.end
            batch.text_bytes = sum(map(len, lines))
            batch.progress, position = raw.tell() - position, raw.tell()
            yield batch


def _parse_lines(lines: list[bytes], wanted: Wanted, start: int) -> RecordBatch:
    """Return the batch of lines whose numbers in the part begin with `start`; the caller sets sizes."""
    records = ((number, parse_line(line, wanted)) for number, line in enumerate(lines, start) if not line.isspace())
    taken = [(number, value) for number, value in records if wanted.selection.takes(value)]
    return RecordBatch([number for number, _ in taken], [value for _, value in taken], start + len(lines), 0, 0)


class ZstdFile(io.RawIOBase):
    """Decompress a .zst file, frame after frame; a frame that was cut off is an error, not the end."""

    def __init__(self, raw: io.BufferedReader) -> None:
        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW_BYTES)
        self._frame = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Return True; see io.RawIOBase."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read decompressed bytes; see io.RawIOBase.

        Raises EOFError if the file ends within a frame, ZstdError if it is damaged.
        """
        while not self._ready:
            chunk = self._raw.read(COMPRESSED_CHUNK_BYTES)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends within a compressed frame")
                return 0
            self._ready = memoryview(b"".join(self._decompress(chunk)))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, chunk: bytes) -> Iterator[bytes]:
        while chunk:
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            yield self._frame.decompress(chunk)
            chunk = b""
            if self._frame.eof:
                chunk = self._frame.unused_data
                self._frame = None
