"""Reads a megatron torch_dist checkpoint tensor by tensor, whatever layout it was saved in.

The format is torch.distributed.checkpoint's: `.metadata` states which chunks make up a tensor, and the file and bytes
of each; a chunk is a torch.save stream.
"""

import io
import os
import pickle
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from conf.system.errors import UserError
from model.convert.mapping import VISION_PARTS, TensorEntry
from model.convert.safetensors_reader import some

# Keys under these modules are weights; everything else in a checkpoint is training state (optimizer, RNG, ...).
_WEIGHT_PREFIXES = ("embedding.", "decoder.", "output_layer.", *VISION_PARTS.values())
COMMON_KEY = "common_state/shard_0_1"  # megatron-core's dictionary of everything that is not sharded
_EXTRA_STATE = "_extra_state"  # Transformer Engine's FP8 scales; empty otherwise


class DistReader:
    """Reads the weights of one step directory. `num_skipped` counts entries that are not weights.

    Raises:
        UserError: the directory is not a readable torch_dist checkpoint.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        metadata = _read_metadata(self.directory)
        self._tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if _is_weight(key) and isinstance(value, TensorStorageMetadata)
        }
        self._storage = metadata.storage_data
        self.num_skipped = len(metadata.state_dict_metadata.keys() - self._tensors.keys() - {COMMON_KEY})

    def check(self, table: list[TensorEntry], dtype: torch.dtype | None = None) -> None:
        """Check that the weights are exactly those of `table` (and of `dtype`, if given). Raises: UserError."""
        expected = {entry.megatron for entry in table}
        missing, extra = sorted(expected - self._tensors.keys()), sorted(self._tensors.keys() - expected)
        if missing or extra:
            raise UserError(
                f"{self.directory} does not hold the weights of the model in its checkpoint.json: missing "
                f"{some(missing) or 'none'}; unknown {some(extra) or 'none'}"
            )
        for entry in table:
            stored = self._tensors[entry.megatron]
            if tuple(stored.size) != entry.megatron_shape:
                raise UserError(
                    f"{self.directory}: tensor {entry.megatron} has shape {list(stored.size)}, but the "
                    f"model in checkpoint.json makes it {list(entry.megatron_shape)}"
                )
            if dtype is not None and stored.properties.dtype is not dtype:
                raise UserError(f"{self.directory}: {entry.megatron} is {stored.properties.dtype}, expected {dtype}")

        self._check_files()

    def _check_files(self) -> None:
        """Check that every chunk lies within an existing file. Raises: UserError."""
        ends: dict[str, int] = {}
        for key, stored in self._tensors.items():
            for chunk in stored.chunks:
                info = self._storage[MetadataIndex(key, chunk.offsets)]
                ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            path = self.directory / name
            if not path.is_file():
                raise UserError(f"{self.directory} lacks the file {name}: copy the checkpoint again")
            if path.stat().st_size < end:
                raise UserError(f"{path} is cut off: {path.stat().st_size} of {end} bytes; copy the checkpoint again")

    def read(self, key: str) -> Tensor:
        """Return the whole tensor on the CPU. Memory: the tensor, and at most its largest chunk once more."""
        stored = self._tensors[key]
        if len(stored.chunks) == 1 and stored.chunks[0].sizes == stored.size:
            return self._read_chunk(key, stored.chunks[0])
        whole = torch.empty(stored.size, dtype=stored.properties.dtype)
        for chunk in stored.chunks:
            place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[place].copy_(self._read_chunk(key, chunk))
        return whole

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._storage[MetadataIndex(key, chunk.offsets)]
        path = self.directory / info.relative_path
        try:
            with _FileSlice(path, info.offset, info.length) as part:
                tensor = torch.load(cast(IO[bytes], part), map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{path} is damaged at tensor {key} ({error}): copy the checkpoint again") from None
        return tensor.detach().view(chunk.sizes)


class _FileSlice(io.RawIOBase):
    """Presents bytes [offset, offset + length) of a file as a file, from which torch.load reads tensors directly."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._offset, self._length, self._position = offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = start + position
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        count = os.preadv(self._descriptor, [view], self._offset + self._position) if view else 0
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _is_weight(key: str) -> bool:
    return key.startswith(_WEIGHT_PREFIXES) and _EXTRA_STATE not in key


def _read_metadata(directory: Path) -> Metadata:
    try:
        return FileSystemReader(directory).read_metadata()
    except FileNotFoundError:
        raise UserError(f"{directory} is not a torch_dist checkpoint: it has no .metadata") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise UserError(f"{directory}/.metadata is damaged ({error}): copy the checkpoint again") from None
