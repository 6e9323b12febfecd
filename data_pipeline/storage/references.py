"""Which images the documents of a shard hold: the `.references` file, small and memory-mapped.

It is a header, then per document the number of its first reference and one past the last (int64), then the references,
in the order in which the images stand in the prompts. `.images` files hold the pictures as they were given, end to end,
each content once in the whole dataset: a reference names the shard that has it.
"""

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from conf.system.errors import UserError
from model.hf.image_tokens import Grid

MAGIC = b"IMAGEREF"
HEADER = struct.Struct("<8sQQQ")  # magic, version, documents, references
VERSION = 1
# shard: in the manifest's list of those with documents. offset, length: bytes of its `.images` file. segment: of the
# document, the prompt that the image is in. height, width: features.
REFERENCE = np.dtype(
    [
        ("sha256", "V32"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("shard", "<i4"),
        ("segment", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
    ]
)
BYTES_PER_BOUND = 8


class ImageReferences:
    """Maps the references of a shard. Raises UserError if the file is missing or not complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        documents, references = _read_header(path)
        first = HEADER.size + BYTES_PER_BOUND * (documents + 1)
        if path.stat().st_size != first + REFERENCE.itemsize * references:
            raise _incomplete(path)
        self._bounds = np.memmap(path, "<i8", "r", HEADER.size, (documents + 1,))
        self._references = _EMPTY
        if references:
            self._references = np.memmap(path, REFERENCE, "r", first, (references,))

    @property
    def num_documents(self) -> int:
        """Return the number of documents."""
        return len(self._bounds) - 1

    def bounds(self, first_document: int, end_document: int) -> np.ndarray:
        """Return [n + 1] the number of the first reference of each of n documents, and one past the last."""
        return self._bounds[first_document : end_document + 1]

    def read(self, first_document: int, end_document: int) -> np.ndarray:
        """Return the references of documents [first, end), in order; see REFERENCE."""
        return self._references[self._bounds[first_document] : self._bounds[end_document]]

    @property
    def all(self) -> np.ndarray:
        """Return all references."""
        return self._references


_EMPTY = np.zeros(0, REFERENCE)


def encode_references(images_per_document: Iterable[int], references: np.ndarray) -> bytes:
    """Return the content of a `.references` file. references: of all documents, end to end; see REFERENCE."""
    counts = np.fromiter(images_per_document, dtype="<i8")
    bounds = np.append(np.zeros(1, "<i8"), np.cumsum(counts, dtype="<i8"))
    assert bounds[-1] == len(references)
    header = HEADER.pack(MAGIC, VERSION, len(counts), len(references))
    return b"".join([header, bounds.tobytes(), references.astype(REFERENCE).tobytes()])


def count_tokens_of_images(references: np.ndarray) -> np.ndarray:
    """Return [n] the tokens that stand for each image in its prompt, int64."""
    return 1 + references["height"].astype(np.int64) * (references["width"] + 1)


def grid_of(reference: np.void) -> Grid:
    """Return the features (height, width) of one reference."""
    return int(reference["height"]), int(reference["width"])


def _read_header(path: Path) -> tuple[int, int]:
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: prepare the data again, or bring it back") from None
    if len(header) < HEADER.size:
        raise _incomplete(path)
    magic, version, documents, references = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise _incomplete(path)
    return documents, references


def _incomplete(path: Path) -> UserError:
    return UserError(f"{path} is no complete list of images of this version: prepare the data again")
