"""Writes safetensors one tensor at a time: the header first, from names and shapes alone, then the data in order.

The same tensors give the same bytes: order, header text and shard boundaries depend on nothing else.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from model.convert.safetensors_reader import DTYPES, INDEX_NAME, SINGLE_NAME, compute_checksum, tensor_bytes

_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes; the data starts at a multiple


@dataclass(frozen=True)
class TensorSpec:
    """Describes a tensor before it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes tensors in the order of `specs` into `directory`: call add() for each. Use it as a context manager.

    A file holds at most max_shard_bytes of data, unless a single tensor is larger. A single file is named
    model.safetensors; several are numbered and get an index. `checksums` maps names to checksums.
    """

    def __init__(self, directory: Path, specs: list[TensorSpec], max_shard_bytes: int) -> None:
        self.directory = directory
        self.shards = plan_shards(specs, max_shard_bytes)
        self._expected = iter([(spec, i) for i, shard in enumerate(self.shards) for spec in shard])
        self._file: BinaryIO | None = None
        self._open_shard = -1
        self.checksums: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            assert next(self._expected, None) is None, "not every tensor was written"
            self._finish_file()
            self._write_index()
        elif self._file is not None:
            self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor of the specs: same name, shape and dtype; CPU."""
        spec, shard = next(self._expected)
        assert (spec.name, spec.shape, spec.dtype) == (name, tuple(tensor.shape), tensor.dtype)
        if shard != self._open_shard:
            self._finish_file()
            self._start_file(shard)
        assert self._file is not None
        tensor = tensor.contiguous()
        self.checksums[name] = compute_checksum(tensor)
        self._file.write(tensor_bytes(tensor))

    def _start_file(self, shard: int) -> None:
        self._open_shard = shard
        self._file = open(self.directory / weight_file_name(shard, len(self.shards)), "wb")  # noqa: SIM115 (lives across calls)
        self._file.write(encode_header(self.shards[shard]))

    def _finish_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def _write_index(self) -> None:
        if len(self.shards) == 1:
            return
        specs = [spec for shard in self.shards for spec in shard]
        totals = {
            "total_parameters": sum(math.prod(spec.shape) for spec in specs),
            "total_size": sum(spec.num_bytes for spec in specs),
        }
        names = {
            spec.name: weight_file_name(i, len(self.shards)) for i, shard in enumerate(self.shards) for spec in shard
        }
        text = json.dumps({"metadata": totals, "weight_map": dict(sorted(names.items()))}, indent=2) + "\n"
        (self.directory / INDEX_NAME).write_text(text, encoding="utf-8")


def weight_file_name(shard: int, num_shards: int) -> str:
    """Return the file name of the shard with this index (from 0)."""
    return SINGLE_NAME if num_shards == 1 else f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"


def plan_shards(specs: list[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Fill shards in order; a tensor that no longer fits opens the next one."""
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        if shards[-1] and used + spec.num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += spec.num_bytes
    return shards


def encode_header(specs: list[TensorSpec]) -> bytes:
    """Encode length and JSON header of a file that holds `specs` in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in specs:
        offsets = [position, position + spec.num_bytes]
        header[spec.name] = {"dtype": _WORDS[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        position += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
