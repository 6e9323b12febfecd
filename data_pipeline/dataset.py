"""Tokenised data as training sequences: memory-mapped, in an order that is a pure function of the sequence's number.

Sequence n of a dataset belongs to epoch n // num_sequences; within an epoch a seeded permutation says which packed
sequence it is. So any sequence is found in constant time, whatever was read before.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from conf.errors import UserError
from conf.schema import DocumentKind
from data_pipeline.form import SequenceForm
from data_pipeline.manifest import (
    DatasetManifest,
    ShardManifest,
    bin_path,
    compute_sha256,
    index_path,
    load_manifest,
    manifest_path,
    shard_manifest_path,
)
from data_pipeline.packing import PackingCounts, build_packer
from data_pipeline.packing_index import PackingIndexBuilder
from data_pipeline.permutation import derive_key, permute
from data_pipeline.rows import Rows, Segments, lay_out
from data_pipeline.shard import Shard

SCAN_PIECE_TOKENS = 1 << 22
# What is looked at of data without a manifest, which may be terabytes that every rank would otherwise read.
NUM_SAMPLED_PIECES, SAMPLED_PIECE_TOKENS = 64, 1 << 16


class StoredTokens:
    """The tokens at `path`: a folder that prepare wrote, or the prefix of one .bin/.idx pair without a manifest.

    manifest: None for data of other tools. kind: text or chat.

    Raises UserError: missing, unfinished or broken data, files that do not belong to the manifest.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = self._load_manifest()
        self.kind = DocumentKind(self.manifest.kind) if self.manifest else DocumentKind.text
        # A shard whose rows were all left out has no tokens to map.
        self._listed = [shard for shard in self.manifest.shards if shard.documents] if self.manifest else []
        self.num_shards = len(self._listed) or 1
        self._shards: dict[int, Shard] = {}
        if self.manifest:
            for shard in self._listed:
                check_shard_files(self.path, shard, self.manifest.dtype)
        else:
            self.open_shard(0)

    @property
    def num_tokens(self) -> int:
        """Tokens on disk."""
        return self.manifest.tokens if self.manifest else self.open_shard(0).num_tokens

    @property
    def num_documents(self) -> int:
        """Documents on disk."""
        return self.manifest.documents if self.manifest else self.open_shard(0).num_documents

    @cached_property
    def sha256(self) -> str:
        """Identity of the data; without a manifest it covers the sizes and pieces spread over the stream."""
        if self.manifest:
            return self.manifest.sha256
        digest = hashlib.sha256(f"{self.num_documents} documents, {self.num_tokens} tokens".encode())
        for piece in self.sampled_pieces():
            digest.update(piece.tobytes())
        return digest.hexdigest()

    @cached_property
    def max_token_id(self) -> int:
        """Largest token id; without a manifest, that of a sample."""
        return self.manifest.max_token_id if self.manifest else max(int(p.max()) for p in self.sampled_pieces())

    def open_shard(self, number: int) -> Shard:
        """Shard `number`, opened when it is first asked for."""
        if number not in self._shards:
            manifest = self._listed[number] if self.manifest else None
            self._shards[number] = Shard(self.path / manifest.name if manifest else self.path, manifest)
        return self._shards[number]

    def count_tokens(self, vocab_size: int) -> np.ndarray:
        """Occurrences [vocab_size] (int64) of every token id."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for number in range(self.num_shards):
            shard = self.open_shard(number)
            for start in range(0, shard.num_tokens, SCAN_PIECE_TOKENS):
                counts += np.bincount(shard.read_stream(start, SCAN_PIECE_TOKENS), minlength=vocab_size)
        return counts

    def sampled_pieces(self) -> Iterator[np.ndarray]:
        """Pieces spread evenly over the first shard, all of a short one."""
        shard = self.open_shard(0)
        stride = max(SAMPLED_PIECE_TOKENS, shard.num_tokens // NUM_SAMPLED_PIECES)
        for start in range(0, shard.num_tokens, stride):
            yield shard.read_stream(start, SAMPLED_PIECE_TOKENS)

    def _load_manifest(self) -> DatasetManifest | None:
        if self.path.is_dir() or not index_path(self.path).exists():
            if not self.path.is_dir():
                raise UserError(
                    f"{self.path} holds no data: give a folder that data_pipeline.prepare made, or the prefix of a "
                    ".bin/.idx pair."
                )
            manifest = load_manifest(self.path)
            if not manifest.documents:
                raise UserError(f"{manifest_path(self.path)} lists no documents: prepare the data again.")
            return manifest
        return None


class TokenDataset:
    """Sequences of one source in the form that a stage needs.

    seed: of the order. shuffle: a new random order in every epoch; without it the sequences come as they are packed.
    Raises UserError: as StoredTokens, and when no sequence can be made.
    """

    def __init__(self, path: Path | str, form: SequenceForm, seed: int, shuffle: bool = True) -> None:
        self.stored = StoredTokens(path)
        self.form = form
        self.seed = seed
        self.shuffle = shuffle
        self._vocab_size: int | None = None
        self._packer = build_packer(self.stored.kind, form)
        stem = f"{self.stored.path}/" if self.stored.manifest else f"{self.stored.path}."
        builder = PackingIndexBuilder(
            stem, self.stored.sha256, self._packer, self.stored.num_shards, self.stored.open_shard
        )
        self._index = builder.load()
        self._check_enough()

    @property
    def num_sequences(self) -> int:
        """Sequences of one epoch."""
        return self._index.counts.sequences

    @property
    def counts(self) -> PackingCounts:
        """What one epoch holds, and what was left out."""
        return self._index.counts

    @property
    def completion_token_id(self) -> int:
        """What fills the last block of a document; data of other tools are filled with their own last token."""
        manifest = self.stored.manifest
        if manifest is not None:
            return manifest.completion_token_id
        shard = self.stored.open_shard(0)
        return int(shard.read_stream(shard.num_tokens - 1, 1)[0])

    def place(self, number: int) -> int:
        """Packed sequence that number `number` (>= 0) of this source is; within an epoch each comes once."""
        epoch, position = divmod(number, self.num_sequences)
        if not self.shuffle:
            return position
        return permute(position, self.num_sequences, derive_key(self.seed, epoch))

    def read_segments(self, packed: int) -> Segments:
        """Segments of a packed sequence."""
        shard, entries, sequence = self._index.find(packed)
        segments = self._packer.read(self.stored.open_shard(shard), entries, sequence)
        self._check_largest(int(segments.tokens.max()))
        return segments

    def build_rows(self, number: int) -> Rows:
        """Sequence `number` of this source, laid out."""
        return lay_out(self.read_segments(self.place(number)), self.form, self.completion_token_id)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError if a token id does not fit a model of `vocab_size`.

        Without a manifest a sample of the data is read now; every sequence is checked as it is built.
        """
        self._vocab_size = vocab_size
        self._check_largest(self.stored.max_token_id)

    def check_tokenizer(self, tokenizer_fingerprint: str) -> None:
        """Raises UserError if the data were made by another tokenizer; without a manifest nothing is known."""
        manifest = self.stored.manifest
        if manifest and manifest.tokenizer_fingerprint != tokenizer_fingerprint:
            raise UserError(
                f"{self.stored.path} was tokenised with tokenizer {manifest.tokenizer_fingerprint}, data.tokenizer is "
                f"{tokenizer_fingerprint}: prepare the data again or point data.tokenizer at the one that made them."
            )

    def _check_enough(self) -> None:
        length = self.form.sequence_length
        if not self.num_sequences:
            raise UserError(f"{self.stored.path}: no chat has an answer within data.sequence_length={length}: raise it.")
        if self.stored.kind is DocumentKind.text and self.stored.num_tokens < length:
            raise UserError(
                f"{self.stored.path} holds {self.stored.num_tokens} tokens, fewer than one sequence of {length}: use "
                "more data or a smaller data.sequence_length."
            )

    def _check_largest(self, largest: int) -> None:
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise UserError(
                f"{self.stored.path} contains token id {largest}, the model has vocab_size {self._vocab_size}: "
                "use the model's own tokenizer for the data, or a model with that vocabulary."
            )


def check_shard_files(directory: Path, shard: ShardManifest, dtype: str) -> None:
    """Raises UserError if a shard's files are gone or are not what the manifest describes.

    Sizes are always compared; the contents of a `.bin` file only if it is newer than the shard's own manifest.
    """
    prefix = directory / shard.name
    paths = (bin_path(prefix), index_path(prefix), shard_manifest_path(prefix))
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} does not exist, but {manifest_path(directory)} lists it: prepare the data again.")
    expected = shard.tokens * np.dtype(dtype).itemsize
    actual = paths[0].stat().st_size
    if actual != expected:
        raise UserError(
            f"{paths[0]} has {actual} bytes, {manifest_path(directory)} describes {expected}: the shard was changed "
            "after it was written; prepare the data again."
        )
    times = [path.stat().st_mtime_ns for path in paths]
    if max(times[:2]) > times[2]:
        verify_shard(directory, shard)
        try:
            shard_manifest_path(prefix).touch()  # a copy, in any order of its files, is read in full only once
        except OSError:
            return


def verify_shard(directory: Path, shard: ShardManifest) -> None:
    """Raises UserError if a shard's tokens or index have another SHA-256 than its manifest says; reads all of them."""
    prefix = directory / shard.name
    for path, expected in ((bin_path(prefix), shard.sha256), (index_path(prefix), shard.index_sha256)):
        if compute_sha256(path) != expected:
            raise UserError(
                f"{path} is not what {manifest_path(directory)} describes (its SHA-256 differs): the shard was changed "
                "after it was written; prepare the data again."
            )
