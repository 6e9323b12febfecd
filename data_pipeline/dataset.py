"""Tokenised data as training sequences: memory-mapped, in an order that is a pure function of the sequence's number.

Sequence n of a dataset belongs to epoch n // num_sequences; within an epoch a seeded permutation says which packed
sequence it is. So any sequence is found in constant time, whatever was read before.
"""

from pathlib import Path

from conf.schema import DocumentKind, OverlongChat
from conf.system.errors import UserError
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.index import PackingIndexBuilder
from data_pipeline.packing.packers import PackingCounts, build_packer
from data_pipeline.packing.sequence import Rows, Segments, lay_out
from data_pipeline.permutation import derive_key, permute
from data_pipeline.storage.stored import StoredTokens


class TokenDataset:
    """Sequences of one source in the form that a stage needs.

    seed: of the order. shuffle: a new random order in every epoch; without it the sequences come as they are packed.
    checks_files: compare the files with the manifest, which one process of many needs to do.
    Raises UserError: as StoredTokens, and when no sequence can be made.
    """

    def __init__(
        self, path: Path | str, form: SequenceForm, seed: int, shuffle: bool = True, checks_files: bool = True
    ) -> None:
        self.stored = StoredTokens(path)
        self.form = form
        self.seed = seed
        self.shuffle = shuffle
        self._vocab_size: int | None = None
        self._packer = build_packer(self.stored.kind, form)
        self._index = PackingIndexBuilder(self.stored, self._packer, checks_files).load()
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
    def block_padding_token_id(self) -> int:
        """What fills the last block of a document; data of other tools are filled with their own last token."""
        manifest = self.stored.manifest
        if manifest is not None:
            return manifest.block_padding_token_id
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
        return lay_out(self.read_segments(self.place(number)), self.form, self.block_padding_token_id)

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
            theirs, given = manifest.tokenizer_fingerprint[:12], tokenizer_fingerprint[:12]
            raise UserError(
                f"{self.stored.path} was tokenised with tokenizer {theirs}, data.tokenizer is {given}: prepare the "
                "data again or point data.tokenizer at the one that made them."
            )

    def _check_enough(self) -> None:
        length, path = self.form.sequence_length, self.stored.path
        if not self.num_sequences:
            other = "" if self.form.overlong_chats is OverlongChat.truncate else ", or set data.overlong_chats=truncate"
            raise UserError(f"{path}: no chat fits into data.sequence_length={length} with an answer; raise it{other}.")
        if self.stored.kind is DocumentKind.text and self.stored.num_tokens < length:
            raise UserError(
                f"{path} holds {self.stored.num_tokens} tokens, fewer than one sequence of {length}: use "
                "more data or a smaller data.sequence_length."
            )

    def _check_largest(self, largest: int) -> None:
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise UserError(
                f"{self.stored.path} contains token id {largest}, the model has vocab_size {self._vocab_size}: "
                "use the model's own tokenizer for the data, or a model with that vocabulary."
            )
