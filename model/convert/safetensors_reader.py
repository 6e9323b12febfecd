"""Reads safetensors by byte range, so that memory holds one tensor at a time.

The file format (8 bytes of header length, JSON header, data) is read here instead of memory-mapped by the library: the
pages of a mapped file count as the process's memory, and a truncated file kills the process with a bus error.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from conf.system.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
FP8 = {"F8_E4M3": torch.float8_e4m3fn}  # a weight in it needs its scale: see fp8.py
_READABLE = DTYPES | FP8
_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class TensorRecord:
    """The place of a tensor in a file. dtype: the format's name (BF16, ...). begin, end: bytes from the start."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsReader:
    """Reads the tensors of a Hugging Face directory: one model.safetensors, else shards named by an index.

    Where both are there, the single file counts, as for transformers, which leaves the index of earlier shards when a
    model is saved again in one file.

    Use it as a context manager; files are opened once. `records` maps names to places, in the order of the files.

    Raises:
        UserError: a shard is missing, a header is damaged, a file is truncated, or index and shards disagree.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.records = _read_records(self.directory)
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, name: str) -> Tensor:
        """Return a new tensor with the values of `name`, in the file's format."""
        record = self.records[name]
        tensor = torch.empty(record.shape, dtype=_READABLE[record.dtype])
        self._fill(tensor, record)
        return tensor

    def read_into(self, name: str, out: Tensor) -> None:
        """Copy `name` into `out`, of the same number of elements but any dtype, shape or strides."""
        record = self.records[name]
        if out.is_contiguous() and out.dtype is _READABLE[record.dtype] and out.device.type == "cpu":
            self._fill(out, record)
        else:
            out.copy_(self.read(name).view(out.shape))

    def _fill(self, tensor: Tensor, record: TensorRecord) -> None:
        buffer = tensor_bytes(tensor)
        position = record.begin
        while buffer:
            count = os.preadv(self._descriptor(record.path), [buffer], position)
            if count == 0:
                raise UserError(f"{record.path} became shorter while it was read: tensor {record.name} is cut off")
            buffer, position = buffer[count:], position + count

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, writable and not copied."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())


def compute_checksum(tensor: Tensor) -> int:
    """Compute crc32 of the bytes of a contiguous CPU tensor."""
    return zlib.crc32(tensor_bytes(tensor))


def _read_records(directory: Path) -> dict[str, TensorRecord]:
    index, single = directory / INDEX_NAME, directory / SINGLE_NAME
    if single.is_file():
        return {record.name: record for record in read_header(single)}
    if not index.is_file():
        raise UserError(f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}: {_what_is_there(directory)}")
    file_of = _read_index(index)
    records = {record.name: record for path in _shards(directory, file_of) for record in read_header(path)}
    _compare_with_index(records, file_of, index)
    return records


def _what_is_there(directory: Path) -> str:
    if not directory.is_dir():
        return "it is not a directory"
    if any(directory.glob("*.bin")):
        return "it holds pickled .bin weights; save the model again with safetensors"
    return "give the folder of a Hugging Face checkpoint saved with safetensors"


def _read_index(path: Path) -> dict[str, str]:
    try:
        file_of = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        assert all(isinstance(name, str) and isinstance(file, str) for name, file in file_of.items())
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
        raise UserError(f"{path} is damaged: it has no weight_map; download it again") from None
    return file_of


def _shards(directory: Path, file_of: dict[str, str]) -> list[Path]:
    paths = [directory / file for file in sorted(set(file_of.values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{directory} lacks {some(missing)}, named in {INDEX_NAME}: download the missing shards")
    return paths


def _compare_with_index(records: dict[str, TensorRecord], file_of: dict[str, str], index: Path) -> None:
    wrong = [name for name, file in file_of.items() if name not in records or records[name].path.name != file]
    if wrong:
        raise UserError(f"{index} names tensors that their shard does not hold: {some(wrong)}; download both again")
    unnamed = [name for name in records if name not in file_of]
    if unnamed:
        raise UserError(f"shards beside {index} hold tensors it does not name: {some(unnamed)}; download it again")


def read_header(path: Path) -> list[TensorRecord]:
    """Read the records of one file, in data order. Raises: UserError if header or length of the file are wrong."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _LONGEST_HEADER):
            raise UserError(f"{path} is not a safetensors file or is cut off inside its header: download it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        data = _LENGTH_BYTES + length
        records = [_record(path, data, name, value) for name, value in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} has a damaged header: download it again") from None
    records.sort(key=lambda record: (record.begin, record.end))
    _check_layout(path, records, data, size)
    return records


def _record(path: Path, data: int, name: str, value: dict[str, Any]) -> TensorRecord:
    """Build a record. Raises: ValueError, KeyError, TypeError or AttributeError if `value` is not a tensor's."""
    begin, end = value["data_offsets"]
    shape = tuple(value["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)) or end < begin:
        raise ValueError(f"tensor {name} has no place in the file")
    return TensorRecord(name, path, str(value["dtype"]), shape, data + begin, data + end)


def _check_layout(path: Path, records: list[TensorRecord], data: int, size: int) -> None:
    """Check that tensors fill the data without gaps and have the bytes of their shapes. Raises: UserError."""
    position = data
    for record in records:
        item = _READABLE[record.dtype].itemsize if record.dtype in _READABLE else None
        if record.begin != position or (item and record.end - record.begin != item * math.prod(record.shape)):
            raise UserError(f"{path} has a damaged header (place of tensor {record.name}): download it again")
        position = record.end
    if position != size:
        state = f"cut off: {size} of {position} bytes" if size < position else f"{size - position} bytes too long"
        raise UserError(f"{path} is {state}; download it again")


def some(names: Iterable[str], limit: int = 5) -> str:
    """Join the first names of a list and count the rest."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
