"""Tokenised text as training sequences: memory-mapped, in an order that is a pure function of the sample index.

The documents of a dataset are one long stream; chunk i is tokens [i*S, (i+1)*S) of it and one training sequence.
A *global sample index* counts the sequences a run has asked for since its first step. Which chunk it names depends on
the seed and on nothing else: not on data-parallel size, microbatches, workers or restarts.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from conf.errors import UserError
from data_pipeline.batch import Batch
from data_pipeline.indexed import open_indexed_dataset
from data_pipeline.manifest import bin_path, load_manifest
from data_pipeline.permutation import derive_key, permute

SCAN_PIECE_TOKENS = 1 << 22
# What is looked at of data without a manifest, which may be terabytes that every rank would otherwise read.
NUM_SAMPLED_PIECES, SAMPLED_PIECE_TOKENS = 64, 1 << 16


class TokenDataset:
    """Sequences of `sequence_length` tokens from the indexed dataset at `prefix`.

    shuffle: a new random order in every epoch (pass over the data); without it, chunks come in stream order, epoch
    after epoch. Tokens after the last whole chunk are not used.

    Raises UserError: missing or broken files, manifest and index that disagree, fewer tokens than one sequence,
    sequence_length no multiple of block_size.
    """

    def __init__(
        self, prefix: Path | str, sequence_length: int, block_size: int, seed: int, shuffle: bool = True
    ) -> None:
        if sequence_length % block_size:
            raise UserError(f"sequence_length {sequence_length} is not a multiple of block_size {block_size}.")
        self.prefix = str(prefix)
        self.sequence_length = sequence_length
        self.block_size = block_size
        self.seed = seed
        self.shuffle = shuffle
        self._vocab_size: int | None = None
        self.manifest = load_manifest(prefix)
        self._indexed = open_indexed_dataset(prefix)
        self.num_documents = len(self._indexed.document_indices) - 1
        self.num_tokens = int(self._indexed.sequence_lengths.sum(dtype=np.int64))
        self.num_samples = self.num_tokens // sequence_length
        self._check_sizes()

    def chunk_index(self, sample_index: int) -> int:
        """Chunk that global sample index `sample_index` (>= 0) reads; within an epoch every chunk comes once."""
        epoch, position = divmod(sample_index, self.num_samples)
        if not self.shuffle:
            return position
        return permute(position, self.num_samples, derive_key(self.seed, epoch))

    def build_batch(self, sample_indices: Sequence[int]) -> Batch:
        """Batch [B, S] of the sequences at B global sample indices, on the CPU."""
        tokens = np.stack([self._read_chunk(self.chunk_index(int(i))) for i in sample_indices])
        self._check_largest(int(tokens.max()))
        rows = len(sample_indices)
        positions = torch.arange(self.sequence_length).repeat(rows, 1)
        return Batch(
            tokens=torch.from_numpy(tokens),
            document_ids=torch.zeros_like(positions),
            block_ids=positions // self.block_size,
            positions=positions,
            loss_mask=torch.ones_like(positions, dtype=torch.bool),
            sample_indices=torch.as_tensor(sample_indices, dtype=torch.int64),
        )

    def fingerprint(self) -> dict[str, int | str]:
        """Identity of the data (not of seed or sequence length), for checkpoints: {documents, tokens, sha256,
        tokenizer_fingerprint}.

        sha256 is that of the `.bin` file as the manifest records it. Without a manifest it covers the sizes and pieces
        spread over the stream, and the tokenizer fingerprint is empty.
        """
        manifest = self.manifest
        return {
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "sha256": manifest.sha256 if manifest else self._sample_sha256(),
            "tokenizer_fingerprint": manifest.tokenizer_fingerprint if manifest else "",
        }

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError if a token id does not fit a model of `vocab_size`.

        Without a manifest a sample of the data is read now; every batch is checked as it is built.
        """
        self._vocab_size = vocab_size
        pieces = self._sampled_pieces()
        self._check_largest(self.manifest.max_token_id if self.manifest else max(int(p.max()) for p in pieces))

    def check_tokenizer(self, tokenizer_fingerprint: str) -> None:
        """Raises UserError if the data were made by another tokenizer; without a manifest nothing is known."""
        if self.manifest and self.manifest.tokenizer_fingerprint != tokenizer_fingerprint:
            raise UserError(
                f"{self.prefix} was tokenised with tokenizer {self.manifest.tokenizer_fingerprint}, data.tokenizer is "
                f"{tokenizer_fingerprint}: tokenise the data again or point data.tokenizer at the one that made them."
            )

    def count_tokens(self, vocab_size: int) -> np.ndarray:
        """Occurrences [vocab_size] (int64) of every token id in the whole stream."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, self.num_tokens, SCAN_PIECE_TOKENS):
            counts += np.bincount(self._read(start, SCAN_PIECE_TOKENS), minlength=vocab_size)
        return counts

    def _read_chunk(self, chunk: int) -> np.ndarray:
        return self._read(chunk * self.sequence_length, self.sequence_length).astype(np.int64)

    def _read(self, start: int, count: int) -> np.ndarray:
        """Up to `count` tokens of the stream from token `start`; documents lie back to back in the file."""
        dtype = self._indexed.index.dtype
        count = min(count, self.num_tokens - start)
        return self._indexed.bin_reader.read(dtype=dtype, count=count, offset=start * np.dtype(dtype).itemsize)

    def _sampled_pieces(self) -> Iterator[np.ndarray]:
        """Pieces spread evenly over the stream, all of a short one."""
        stride = max(SAMPLED_PIECE_TOKENS, self.num_tokens // NUM_SAMPLED_PIECES)
        for start in range(0, self.num_tokens, stride):
            yield self._read(start, SAMPLED_PIECE_TOKENS)

    def _sample_sha256(self) -> str:
        digest = hashlib.sha256(f"{self.num_documents} documents, {self.num_tokens} tokens".encode())
        for piece in self._sampled_pieces():
            digest.update(piece.tobytes())
        return digest.hexdigest()

    def _check_largest(self, largest: int) -> None:
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise UserError(
                f"{self.prefix} contains token id {largest}, the model has vocab_size {self._vocab_size}: "
                "use the model's own tokenizer for the data, or a model with that vocabulary."
            )

    def _check_sizes(self) -> None:
        expected_bytes = self.num_tokens * np.dtype(self._indexed.index.dtype).itemsize
        actual_bytes = bin_path(self.prefix).stat().st_size
        if actual_bytes != expected_bytes or (self.manifest and self.manifest.tokens != self.num_tokens):
            raise UserError(
                f"The files of {self.prefix} do not belong together: the index describes {self.num_tokens} tokens "
                f"({expected_bytes} bytes), the .bin file has {actual_bytes} bytes"
                + (f", the manifest says {self.manifest.tokens} tokens" if self.manifest else "")
                + ". Tokenise the data again."
            )
        if not self.num_samples:
            raise UserError(
                f"{self.prefix} holds {self.num_tokens} tokens, fewer than one sequence of {self.sequence_length}: "
                "use more data or a smaller data.sequence_length."
            )
