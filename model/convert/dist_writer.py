"""Writes a megatron torch_dist checkpoint tensor by tensor, without a process group.

torch.distributed.checkpoint's own writer holds every tensor of a file in memory until the file is complete; this one
appends chunks to bounded files and leaves only the index to that library. `dist_checkpointing.load` reads the result
into any layout, because it reshards by the index.
"""

import io
import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.storage import WriteResult

from model.convert.dist_reader import COMMON_KEY
from model.convert.mapping import Rule, TensorEntry
from model.convert.safetensors_reader import compute_checksum

_MAX_FILE_BYTES = 5_000_000_000
# megatron-core expects two more things in each checkpoint: metadata.json and a common dictionary. They are written as
# its 0.19 does, without importing it, which takes seconds. The dictionary is empty: checkpoint.json describes the
# checkpoint.
_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


class DistWriter:
    """Writes weights into `directory`. Use it as a context manager; the index is written when the block succeeds.

    Attributes:
        directory: the step directory.
        tensor_parallel: chunks per split tensor. A rank of that layout reads only its own part; in any other layout a
            rank reads the chunks that overlap with its own.
        checksums: key -> checksum of the tensor that was added.
    """

    def __init__(self, directory: Path, tensor_parallel: int = 1) -> None:
        self.directory = directory
        self.tensor_parallel = tensor_parallel
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._results: list[WriteResult] = []
        self._file: BinaryIO | None = None
        self._num_files = 0
        self.checksums: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._add_common_state()
            self._finish_file()
            FileSystemWriter(self.directory).finish(Metadata(self._tensors), [self._results])
            (self.directory / "metadata.json").write_text(json.dumps(_BACKEND), encoding="utf-8")
        elif self._file is not None:
            self._file.close()

    def add(self, entry: TensorEntry, tensor: Tensor) -> None:
        """Append one tensor, in chunks."""
        assert tuple(tensor.shape) == entry.megatron_shape
        self.checksums[entry.megatron] = compute_checksum(tensor)
        chunks = plan_chunks(entry, self.tensor_parallel)
        for chunk in chunks:
            place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            part = tensor[place]
            # torch.save writes the whole storage of a view, so a part needs its own.
            self._append(MetadataIndex(entry.megatron, chunk.offsets), part if len(chunks) == 1 else part.clone())
        properties = TensorProperties.create_from_tensor(tensor)
        self._tensors[entry.megatron] = TensorStorageMetadata(properties, tensor.size(), chunks)

    def _add_common_state(self) -> None:
        stream = io.BytesIO()
        torch.save([{}], stream)
        self._append(MetadataIndex(COMMON_KEY), stream)
        self._tensors[COMMON_KEY] = BytesStorageMetadata()

    def _append(self, index: MetadataIndex, data: Tensor | io.BytesIO) -> None:
        file = self._writable_file()
        begin = file.tell()
        if isinstance(data, Tensor):
            torch.save(data, file)
        else:
            file.write(data.getbuffer())
        info = _StorageInfo(Path(file.name).name, begin, file.tell() - begin)
        self._results.append(WriteResult(index, info.length, info))

    def _writable_file(self) -> BinaryIO:
        if self._file is not None and self._file.tell() >= _MAX_FILE_BYTES:
            self._finish_file()
        if self._file is None:
            self._file = open(self.directory / f"__0_{self._num_files}.distcp", "wb")  # noqa: SIM115 (lives across calls)
            self._num_files += 1
        return self._file

    def _finish_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def plan_chunks(entry: TensorEntry, tensor_parallel: int) -> list[ChunkStorageMetadata]:
    """Cut a tensor into equal slices along its tensor-parallel axis; of gate_up both halves are cut."""
    axis, shape = entry.tensor_parallel_axis, entry.megatron_shape
    if axis is None:
        return [ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))]
    count = tensor_parallel * (2 if entry.rule is Rule.gate_up and tensor_parallel > 1 else 1)
    assert shape[axis] % count == 0 and math.prod(shape) > 0
    sizes = torch.Size(n // count if i == axis else n for i, n in enumerate(shape))
    return [
        ChunkStorageMetadata(torch.Size(k * sizes[axis] if i == axis else 0 for i in range(len(shape))), sizes)
        for k in range(count)
    ]
