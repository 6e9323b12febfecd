"""Write a shard of chats with images: their pictures end to end in `.images`, each content once, beside the tokens."""

import hashlib
import os
from array import array
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from conf.system.atomic import atomic_write_bytes, own_partial_path
from data_pipeline.encoder import EncodedImage, PicturedDocument
from data_pipeline.prepare.writer import ShardContents, ShardWriter, writing
from data_pipeline.storage.manifest import ShardImages, images_path, references_path
from data_pipeline.storage.references import REFERENCE, count_tokens_of_images, encode_references


class PicturedShardWriter:
    """Collects chats with images; see DocumentWriter.

    tokens: writes their tokens. prefix: of the shard. work_prefix: of what finish.py needs of it: references whose
    pictures are all in this shard. Memory is 64 bytes per image, 8 per document, and some 200 per picture.

    Raises UserError naming the file when it cannot be written.
    """

    def __init__(self, tokens: ShardWriter, prefix: Path, work_prefix: Path) -> None:
        self._tokens, self._prefix, self._work_prefix = tokens, prefix, work_prefix
        self._images_per_document = array("q")
        self._references = bytearray()
        self._offsets: dict[bytes, int] = {}  # of each content, by its hash
        self._num_bytes = 0
        self._fixed: Counter[str] = Counter()
        self._digest = hashlib.sha256()
        self._path = own_partial_path(images_path(prefix))
        with writing(self._path):
            self._file = open(self._path, "wb")  # noqa: SIM115 (closed by publish or discard)

    def add(self, documents: list[PicturedDocument]) -> int:
        """Append documents; return their number of tokens."""
        for document in documents:
            self._images_per_document.append(len(document.images))
            for image in document.images:
                self._refer(image)
        return self._tokens.add([document.segments for document in documents])

    def publish(self) -> ShardContents:
        """Complete the files under their final names; a shard without a document leaves none."""
        if not self._images_per_document:
            self.discard()
            return self._tokens.publish()
        references = np.frombuffer(self._references, REFERENCE)
        content = encode_references(self._images_per_document, references)
        with writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._path, images_path(self._prefix))
            atomic_write_bytes(references_path(self._work_prefix), content)
        images = ShardImages(
            references=len(references),
            tokens=int(count_tokens_of_images(references).sum()),
            num_bytes=self._num_bytes,
            sha256=self._digest.hexdigest(),
            references_sha256=hashlib.sha256(content).hexdigest(),
            fixed=dict(sorted(self._fixed.items())),
        )
        return replace(self._tokens.publish(), images=images)

    def discard(self) -> None:
        """Close and remove the temporary files."""
        with suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        self._path.unlink(missing_ok=True)
        self._tokens.discard()

    def _refer(self, image: EncodedImage) -> None:
        digest = bytes.fromhex(image.sha256)
        if digest not in self._offsets:
            self._offsets[digest] = self._num_bytes
            self._num_bytes += len(image.data)
            self._digest.update(image.data)
            with writing(self._path):
                self._file.write(image.data)
        height, width = image.grid
        reference = (digest, self._offsets[digest], len(image.data), 0, image.segment, height, width)
        self._references += np.array(reference, REFERENCE).tobytes()
        self._fixed.update(image.fixes)
