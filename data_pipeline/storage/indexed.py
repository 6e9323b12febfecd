"""Opening megatron-core's indexed datasets so that a broken one is named before anything reads it."""

from pathlib import Path

from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from conf.system.errors import UserError
from data_pipeline.storage.index_format import (
    BYTES_PER_BOUNDARY,
    BYTES_PER_SEQUENCE,
    INDEX_HEADER,
    INDEX_MAGIC,
    INDEX_VERSION,
)
from data_pipeline.storage.manifest import bin_path, index_path


def open_indexed_dataset(prefix: Path | str) -> IndexedDataset:
    """megatron-core's reader of `<prefix>.bin` and `<prefix>.idx`. Its arrays are views that die with it.

    Raises UserError if a file is missing, empty or not what its name says.
    """
    for path in (bin_path(prefix), index_path(prefix)):
        if not path.is_file():
            raise UserError(f"{path} does not exist: {prefix} must be the prefix of a .bin/.idx pair.")
    if not bin_path(prefix).stat().st_size:
        raise UserError(f"{bin_path(prefix)} is empty: tokenise at least one document.")
    _check_index(index_path(prefix))
    return IndexedDataset(str(prefix))


def _check_index(path: Path) -> None:
    """megatron-core asserts, reads past the end or leaves a half-built object behind where this raises UserError."""
    with open(path, "rb") as file:
        header = file.read(INDEX_HEADER.size)
    if len(header) == INDEX_HEADER.size:
        magic, version, dtype_code, sequences, boundaries = INDEX_HEADER.unpack(header)
        needed = INDEX_HEADER.size + BYTES_PER_SEQUENCE * sequences + BYTES_PER_BOUNDARY * boundaries
        known = magic == INDEX_MAGIC and version == INDEX_VERSION and dtype_code in {dtype.value for dtype in DType}
        if known and path.stat().st_size >= needed:
            return
    raise UserError(f"{path} is not a complete megatron-core index: tokenise the data again.")
