"""Read tokens from disk: a folder that prepare wrote, or a `.bin`/`.idx` pair of another Megatron tool."""

import hashlib
import logging
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from conf.schema import DocumentKind
from conf.system.errors import UserError
from data_pipeline.storage.checks import Stamp, is_newer_than_manifest, stamp_shard, verify_shard
from data_pipeline.storage.image_file import StoredImage
from data_pipeline.storage.index_file import check_index_file
from data_pipeline.storage.manifest import (
    DatasetManifest,
    bin_path,
    images_path,
    index_path,
    load_manifest,
    manifest_path,
    references_path,
    sample_sha256,
)
from data_pipeline.storage.references import ImageReferences


class Shard:
    """Reads the memory-mapped tokens of one shard, whose documents lie end to end, as do the segments of a document.

    expected_tokens: their number according to a manifest.

    Raises UserError: files missing, broken, or not as long as their index or their manifest says.
    """

    def __init__(self, prefix: Path | str, expected_tokens: int | None = None) -> None:
        self.prefix = str(prefix)
        self._dataset = _open_indexed_dataset(prefix)  # keeps the maps alive that the index's arrays are views of
        self._index = self._dataset.index
        self._dtype = np.dtype(self._index.dtype)
        self.num_documents = len(self._index.document_indices) - 1
        self.num_tokens = bin_path(prefix).stat().st_size // self._dtype.itemsize
        self._check_size(expected_tokens)
        if expected_tokens is None:
            self._check_documents()

    @cached_property
    def images(self) -> ImageReferences | None:
        """Return the images of the documents; None where they have none. Raises UserError as ImageReferences does."""
        path = references_path(self.prefix)
        return ImageReferences(path) if path.is_file() else None

    def segment_bounds(self, first_document: int, end_document: int) -> np.ndarray:
        """Return [n + 1] the index of the first segment of each of n documents, and of the segment after them."""
        return self._index.document_indices[first_document : end_document + 1]

    def segment_lengths(self, first_segment: int, end_segment: int) -> np.ndarray:
        """Return [n] the length of each segment in tokens."""
        return self._index.sequence_lengths[first_segment:end_segment]

    def document_lengths(self, first_document: int, end_document: int) -> np.ndarray:
        """Return [n] the length of each of n documents in tokens, int64."""
        bounds = self.segment_bounds(first_document, end_document)
        lengths = self.segment_lengths(bounds[0], bounds[-1]).astype(np.int64)
        if len(lengths) == len(bounds) - 1 and (np.diff(bounds) == 1).all():
            return lengths
        totals = np.append(0, np.cumsum(lengths))
        return np.diff(totals[bounds - bounds[0]])

    def read(self, document: int, offset: int, count: int) -> np.ndarray:
        """Return [count] tokens, int64, from token `offset` of a document on, even beyond its end."""
        segment = self._index.document_indices[document]
        start = int(self._index.sequence_pointers[segment]) + offset * self._dtype.itemsize
        # A copy, because a view would crash the process once the map is gone.
        return self._dataset.bin_reader.read(dtype=self._dtype.type, count=count, offset=start).astype(np.int64)

    def read_stream(self, first_token: int, count: int) -> np.ndarray:
        """Return up to `count` tokens from token `first_token` of the whole shard on."""
        count = min(count, self.num_tokens - first_token)
        start = first_token * self._dtype.itemsize
        return self._dataset.bin_reader.read(dtype=self._dtype.type, count=count, offset=start)

    def _check_size(self, expected_tokens: int | None) -> None:
        pointers, lengths = self._index.sequence_pointers, self._index.sequence_lengths
        described = int(pointers[-1]) // self._dtype.itemsize + int(lengths[-1]) if len(lengths) else 0
        has_all = bin_path(self.prefix).stat().st_size == described * self._dtype.itemsize
        if not has_all or expected_tokens not in (None, self.num_tokens):
            raise UserError(
                f"The files of {self.prefix} do not belong together: the index describes {described} tokens, the "
                f".bin file has {self.num_tokens}"
                + (f", the manifest says {expected_tokens}" if expected_tokens is not None else "")
                + ". Prepare the data again."
            )

    def _check_documents(self) -> None:
        """Check the index of another tool, which need not be megatron-core's own."""
        wrong = None
        if any((np.diff(part) < 0).any() for part in _overlapping(self._index.document_indices)):
            wrong = "has documents that are not in order"
        elif not self._is_end_to_end():
            wrong = "has sequences that do not lie end to end"
        if wrong:
            raise UserError(f"{index_path(self.prefix)} {wrong}: write the pair again with the tool that made it.")

    def _is_end_to_end(self) -> bool:
        parts = zip(
            _overlapping(self._index.sequence_pointers), _overlapping(self._index.sequence_lengths), strict=True
        )
        return all(
            (lengths >= 0).all() and (np.diff(starts) == lengths[:-1].astype(np.int64) * self._dtype.itemsize).all()
            for starts, lengths in parts
        )


def _overlapping(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield parts of a memory-mapped array; the first element of each is the last one of the part before."""
    for start in range(0, max(1, len(array) - 1), INDEX_CHUNK):
        yield array[start : start + INDEX_CHUNK + 1]


INDEX_CHUNK = 1 << 20
SCAN_CHUNK_TOKENS = 1 << 22
# Of data without a manifest a sample is read: they may be terabytes, which every rank would otherwise read.
NUM_SAMPLED_CHUNKS, SAMPLED_CHUNK_TOKENS = 64, 1 << 16
# A shard takes three file descriptors and two maps, and a dataset may have tens of thousands of them.
MAX_OPEN_SHARDS = 64
logger = logging.getLogger(__name__)


class StoredTokens:
    """Gives access to the tokens at `path`, shard by shard.

    manifest: None for data of other tools. kind: text or chat. num_shards: those that hold a document.

    Raises UserError: missing, unfinished or broken data.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = self._load_manifest()
        self.kind = DocumentKind(self.manifest.kind) if self.manifest else DocumentKind.text
        # A shard whose records were all left out has no tokens to map.
        self._listed = [shard for shard in self.manifest.shards if shard.documents] if self.manifest else []
        self.num_shards = len(self._listed) or 1
        if self.manifest is None:
            self.open_shard(0)

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens on disk."""
        return self.manifest.tokens if self.manifest else self.open_shard(0).num_tokens

    @property
    def num_documents(self) -> int:
        """Return the number of documents on disk."""
        return self.manifest.documents if self.manifest else self.open_shard(0).num_documents

    @cached_property
    def sha256(self) -> str:
        """Return the identity of the data; without a manifest it covers sizes and chunks spread over both files."""
        if self.manifest:
            return self.manifest.sha256
        paths = (bin_path(self.path), index_path(self.path))
        hashes = [sample_sha256(path, path.stat().st_size) for path in paths]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    @cached_property
    def max_token_id(self) -> int:
        """Return the largest token id; without a manifest, that of a sample."""
        return self.manifest.max_token_id if self.manifest else max(int(chunk.max()) for chunk in self.sample())

    def open_shard(self, number: int) -> Shard:
        """Return shard `number`, opened. Only the latest MAX_OPEN_SHARDS stay open, over all datasets."""
        if self.manifest is None:
            return open_shard(str(self.path), None)
        return open_shard(str(self.path / self._listed[number].name), self._listed[number].tokens)

    def list_images(self, references: np.ndarray) -> list[StoredImage]:
        """Return the pictures that references (see storage.references.REFERENCE) of these data mean."""
        return [
            StoredImage(
                images_path(self.path / self._listed[int(reference["shard"])].name),
                int(reference["offset"]),
                int(reference["length"]),
                reference["sha256"].tobytes().hex(),
            )
            for reference in references
        ]

    def stamp(self, number: int) -> Stamp | None:
        """Return sizes and times of the files of shard `number`; None without a manifest to compare them with.

        Raises UserError if they are gone or of another size than the manifest says.
        """
        return stamp_shard(self.path, self._listed[number], self.manifest.dtype) if self.manifest else None

    def verify(self, number: int, was_known: bool) -> None:
        """Raise UserError if shard `number` is not what the manifest describes.

        was_known: its files were seen before and have changed since, so all is read; else only if they look changed.
        """
        if self.manifest and (was_known or is_newer_than_manifest(self.path, self._listed[number])):
            logger.info("%s: reading all of %s, which may have changed", self.path, self._listed[number].name)
            verify_shard(self.path, self._listed[number])

    def count_tokens(self, vocab_size: int) -> np.ndarray:
        """Return [vocab_size] the number of occurrences of every token id, int64."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for number in range(self.num_shards):
            shard = self.open_shard(number)
            for start in range(0, shard.num_tokens, SCAN_CHUNK_TOKENS):
                counts += np.bincount(shard.read_stream(start, SCAN_CHUNK_TOKENS), minlength=vocab_size)
        return counts

    def sample(self) -> Iterator[np.ndarray]:
        """Yield chunks of tokens spread evenly over the first shard, all of a short one."""
        shard = self.open_shard(0)
        stride = max(SAMPLED_CHUNK_TOKENS, shard.num_tokens // NUM_SAMPLED_CHUNKS)
        for start in range(0, shard.num_tokens, stride):
            yield shard.read_stream(start, SAMPLED_CHUNK_TOKENS)

    def _load_manifest(self) -> DatasetManifest | None:
        if self.path.is_dir():
            manifest = load_manifest(self.path)
            if not manifest.documents:
                raise UserError(f"{manifest_path(self.path)} lists no documents: prepare the data again.")
            return manifest
        if not index_path(self.path).exists():
            raise UserError(
                f"{self.path} holds no data: give a folder that data_pipeline.prepare made, or the prefix of a "
                ".bin/.idx pair."
            )
        return None


def _open_indexed_dataset(prefix: Path | str) -> IndexedDataset:
    """Open `<prefix>.bin` and `<prefix>.idx` with megatron-core's reader, whose arrays are views that die with it.

    Raises UserError if a file is missing, empty or not what its name says.
    """
    for path in (bin_path(prefix), index_path(prefix)):
        if not path.is_file():
            raise UserError(f"{path} does not exist: {prefix} must be the prefix of a .bin/.idx pair.")
    if not bin_path(prefix).stat().st_size:
        raise UserError(f"{bin_path(prefix)} is empty: tokenise at least one document.")
    check_index_file(index_path(prefix))
    return IndexedDataset(str(prefix))


@lru_cache(maxsize=MAX_OPEN_SHARDS)
def open_shard(prefix: str, num_tokens: int | None) -> Shard:
    """Return the shard at `prefix`, one of the latest few that stay open. Raises UserError as Shard does."""
    return Shard(prefix, num_tokens)
