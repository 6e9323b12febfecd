"""One `.bin`/`.idx` pair, opened: where its documents and their segments lie."""

from pathlib import Path

import numpy as np

from conf.system.errors import UserError
from data_pipeline.storage.indexed import open_indexed_dataset
from data_pipeline.storage.manifest import bin_path


class Shard:
    """Memory-mapped tokens of one shard. Its documents lie end to end, and so do the segments of a document.

    num_documents, num_tokens: counts. expected_tokens: what a manifest says.

    Raises UserError: files missing, broken, or not as long as their index or their manifest says.
    """

    def __init__(self, prefix: Path | str, expected_tokens: int | None = None) -> None:
        self.prefix = str(prefix)
        self._dataset = open_indexed_dataset(prefix)  # keeps the maps alive that the index's arrays are views of
        self._index = self._dataset.index
        self._dtype = np.dtype(self._index.dtype)
        self.num_documents = len(self._index.document_indices) - 1
        self.num_tokens = bin_path(prefix).stat().st_size // self._dtype.itemsize
        self._check_size(expected_tokens)

    def segment_bounds(self, first_document: int, end_document: int) -> np.ndarray:
        """[n + 1] index of the first segment of each of n documents, and of the segment after them."""
        return self._index.document_indices[first_document : end_document + 1]

    def segment_lengths(self, first_segment: int, end_segment: int) -> np.ndarray:
        """[n] tokens of each segment."""
        return self._index.sequence_lengths[first_segment:end_segment]

    def document_lengths(self, first_document: int, end_document: int) -> np.ndarray:
        """[n] tokens of each of n documents, int64."""
        bounds = self.segment_bounds(first_document, end_document)
        lengths = self.segment_lengths(bounds[0], bounds[-1]).astype(np.int64)
        if len(lengths) == len(bounds) - 1 and (np.diff(bounds) == 1).all():
            return lengths
        totals = np.append(0, np.cumsum(lengths))
        return np.diff(totals[bounds - bounds[0]])

    def read(self, document: int, offset: int, count: int) -> np.ndarray:
        """[count] tokens, int64, from token `offset` of a document on; they may run into the documents after it."""
        segment = self._index.document_indices[document]
        start = int(self._index.sequence_pointers[segment]) + offset * self._dtype.itemsize
        # A copy: views of the map crash the process once the map is gone.
        return self._dataset.bin_reader.read(dtype=self._dtype.type, count=count, offset=start).astype(np.int64)

    def read_stream(self, first_token: int, count: int) -> np.ndarray:
        """Up to `count` tokens from token `first_token` of the whole shard on."""
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
