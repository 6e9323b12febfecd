"""Write and check megatron-core's `.idx` files without importing megatron-core: workers start fast and stay small.

The `.bin` file of a shard holds the tokens of all sequences, end to end. Its `.idx` file is a header, then per sequence
its length (int32) and byte offset in the `.bin` file (int64), then the number of the first sequence of every document
and one past the last (int64).
"""

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from conf.system.errors import UserError

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
BYTES_PER_SEQUENCE = 12
BYTES_PER_BOUNDARY = 8
# megatron-core's DType: numpy name -> code.
DTYPE_CODES = {
    "uint8": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "float64": 6,
    "float32": 7,
    "uint16": 8,
}
LARGEST_UINT16_VOCABULARY = 65499  # megatron-core's DType.optimal_dtype


def choose_dtype(vocab_size: int) -> str:
    """Return the numpy name of the narrowest integer that megatron-core stores ids of a vocabulary in."""
    return "uint16" if vocab_size <= LARGEST_UINT16_VOCABULARY else "int32"


def encode_index(dtype: np.dtype, lengths: np.ndarray, sequences_per_document: np.ndarray) -> bytes:
    """Return the content of the `.idx` file of sequences that lie end to end in the `.bin` file.

    Args:
        dtype: of the tokens.
        lengths: int32 [sequences], in tokens.
        sequences_per_document: int32 [documents].
    """
    offsets = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], out=offsets[1:])
    documents = np.zeros(len(sequences_per_document) + 1, dtype=np.int64)
    np.cumsum(sequences_per_document, out=documents[1:])
    header = INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, DTYPE_CODES[dtype.name], len(lengths), len(documents))
    return b"".join([header, lengths.tobytes(), (offsets * dtype.itemsize).tobytes(), documents.tobytes()])


def check_index_file(path: Path) -> None:
    """Raise UserError unless `path` is a complete index of token ids, whose documents are made of all its sequences.

    megatron-core asserts, reads past the end of such a file, or leaves a half-built object.
    """
    with open(path, "rb") as file:
        header = file.read(INDEX_HEADER.size)
        if len(header) < INDEX_HEADER.size:
            raise _incomplete(path)
        magic, version, dtype_code, sequences, boundaries = INDEX_HEADER.unpack(header)
        first = INDEX_HEADER.size + BYTES_PER_SEQUENCE * sequences
        last = first + BYTES_PER_BOUNDARY * (boundaries - 1)
        known = magic == INDEX_MAGIC and version == INDEX_VERSION and dtype_code in DTYPE_CODES.values()
        if not known or path.stat().st_size < last + BYTES_PER_BOUNDARY:
            raise _incomplete(path)
        ends = [_read_boundary(file, place) for place in (first, last)] if boundaries else []
    dtype = next(name for name, code in DTYPE_CODES.items() if code == dtype_code)
    if dtype.startswith("float"):
        wrong = f"holds {dtype} numbers, and token ids are integers"
    elif not ends or ends[0] != 0:
        wrong = "has documents that do not begin with the first sequence"
    elif ends[1] != sequences:
        wrong = f"has {sequences} sequences, but the last document ends after {ends[1]}"
    else:
        return
    raise UserError(f"{path} {wrong}: write the pair again with the tool that made it.")


def _incomplete(path: Path) -> UserError:
    return UserError(f"{path} is not a complete megatron-core index: tokenise the data again.")


def _read_boundary(file: BinaryIO, place: int) -> int:
    file.seek(place)
    return int.from_bytes(file.read(BYTES_PER_BOUNDARY), "little", signed=True)
