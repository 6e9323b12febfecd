"""Write one `.bin`/`.idx` pair in megatron-core's format (see storage/index_file.py)."""

import hashlib
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from conf.system.atomic import atomic_write_bytes, own_partial_path
from conf.system.errors import UserError
from data_pipeline.encoder import DocumentTokens
from data_pipeline.storage.index_file import encode_index
from data_pipeline.storage.manifest import ShardImages, bin_path, index_path


@dataclass(frozen=True)
class ShardContents:
    """Describes what a shard holds; see storage.manifest.ShardManifest."""

    documents: int
    tokens: int
    scored_tokens: int
    max_token_id: int
    longest_document: int
    sha256: str
    index_sha256: str
    images: ShardImages | None = None


class DocumentWriter(Protocol):
    """Collects the documents of a shard."""

    def add(self, documents: list[Any]) -> int:
        """Append documents as their encoder gives them; return their number of tokens."""
        ...

    def publish(self) -> ShardContents:
        """Complete the files under their final names; a shard without a document leaves none."""
        ...

    def discard(self) -> None:
        """Close and remove temporary files."""
        ...


class ShardWriter:
    """Collects documents in files with temporary names; `publish` flushes the files and gives them their final names.

    Memory is 4 bytes per sequence and per document; tokens go to the file at once.
    Raises UserError naming the file when it cannot be written (full disk, no permission).
    """

    def __init__(self, prefix: Path, dtype: str, is_chat: bool) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._is_chat = is_chat
        self._lengths = array("i")
        self._segments_per_document = array("i")
        self._tokens = self._scored_tokens = self._longest = self._largest_id = 0
        self._digest = hashlib.sha256()
        self._path = own_partial_path(bin_path(prefix))
        with writing(self._path):
            self._file = open(self._path, "wb")  # noqa: SIM115 (closed by publish or discard)

    def add(self, documents: list[DocumentTokens]) -> int:
        """Append documents; return their number of tokens."""
        lengths = [len(segment) for document in documents for segment in document]
        count = sum(lengths)
        ids = chain.from_iterable(chain.from_iterable(documents))
        tokens = np.fromiter(ids, dtype=self._dtype, count=count)
        if not count:
            return 0
        data = tokens.tobytes()
        self._digest.update(data)
        with writing(self._path):
            self._file.write(data)
        self._lengths.extend(lengths)
        self._segments_per_document.extend([len(document) for document in documents])
        self._tokens += count
        self._largest_id = max(self._largest_id, int(tokens.max()))
        self._longest = max(self._longest, max(sum(map(len, document)) for document in documents))
        self._scored_tokens += sum(len(s) for d in documents for s in d[1::2]) if self._is_chat else count
        return count

    def publish(self) -> ShardContents:
        """Complete the files under their final names; a shard without a document leaves none."""
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        index = encode_index(self._dtype, lengths, np.frombuffer(self._segments_per_document, dtype=np.int32))
        if not self._tokens:
            self.discard()
        else:
            self._publish_files(index)
        return ShardContents(
            documents=len(self._segments_per_document),
            tokens=self._tokens,
            scored_tokens=self._scored_tokens,
            max_token_id=self._largest_id,
            longest_document=self._longest,
            sha256=self._digest.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )

    def discard(self) -> None:
        """Close and remove the temporary file."""
        with suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        self._path.unlink(missing_ok=True)

    def _publish_files(self, index: bytes) -> None:
        with writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._path, bin_path(self._prefix))
            atomic_write_bytes(index_path(self._prefix), index)  # flushes the directory too


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn OSError into UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or path}: {error.strerror}; finished shards stay, and the same command "
            "continues once there is space and permission"
        ) from error
