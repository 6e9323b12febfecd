"""Serve tokenised data: TokenDataset, one source; Blend, several as one stream.

Data are memory-mapped, in an order that is a pure function of the sequence's number. Sequence n of a source belongs to
epoch n // num_sequences; within an epoch a seeded permutation says which packed sequence it is. So any sequence is
found in constant time, whatever was read before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import DocumentKind, OverlongChat, SourceConfig
from conf.system.errors import UserError
from data_pipeline import order as sample_order
from data_pipeline.batch import Batch, stack_batches
from data_pipeline.images.place import place_images
from data_pipeline.order import BlendOrder, SourceOrder, derive_key, permute
from data_pipeline.packing.counts import PackingCounts
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.index import PackingIndexBuilder
from data_pipeline.packing.packers import build_packer
from data_pipeline.packing.sequence import Outline, Segments, lay_out
from data_pipeline.storage.tokens import StoredTokens


class TokenDataset:
    """Gives the sequences of one source in the form that a stage needs.

    seed: of the order. shuffle: a new random order in every epoch; without it the sequences come as they are packed.
    checks_files: compare the files with the manifest; one process of many is enough for that.
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
        self._mask_token_id: int | None = None
        self._packer = build_packer(self.stored.kind, form)
        self._index = PackingIndexBuilder(self.stored, self._packer, checks_files).load()
        self._check_enough()

    @property
    def num_sequences(self) -> int:
        """Return the number of sequences of one epoch."""
        return self._index.counts.sequences

    @property
    def counts(self) -> PackingCounts:
        """Return what one epoch holds, and what was left out."""
        return self._index.counts

    @property
    def block_padding_token_id(self) -> int:
        """Return the token that fills last blocks; for data of other tools it is their own last token."""
        manifest = self.stored.manifest
        if manifest is not None:
            return manifest.block_padding_token_id
        shard = self.stored.open_shard(0)
        return int(shard.read_stream(shard.num_tokens - 1, 1)[0])

    def place(self, number: int) -> int:
        """Return the packed sequence that comes as number `number` (>= 0); within an epoch each comes once."""
        epoch, position = divmod(number, self.num_sequences)
        if not self.shuffle:
            return position
        return permute(position, self.num_sequences, derive_key(self.seed, epoch))

    def read_segments(self, packed: int) -> Segments:
        """Return the segments of a packed sequence."""
        shard, entries, sequence = self._index.find(packed)
        segments = self._packer.read(self.stored.open_shard(shard), entries, sequence)
        self._check_ids(segments.tokens)
        return segments

    def outline(self, number: int) -> Outline:
        """Return the outline of sequence `number` of this source; no token is read."""
        shard, entries, sequence = self._index.find(self.place(number))
        return self._packer.outline(self.stored.open_shard(shard), entries, sequence)

    def build_sequence(self, number: int, sample_index: int = 0) -> Batch:
        """Return sequence `number` of this source, laid out, as a batch of one; sample_index: of it in the run."""
        segments = self.read_segments(self.place(number))
        batch = lay_out(segments, self.form, self.block_padding_token_id, sample_index)
        if segments.images is None:
            return batch
        return place_images(batch, self.stored.list_images(segments.images), segments.images)

    def check_vocabulary(self, vocab_size: int, mask_token_id: int) -> None:
        """Raise UserError if a token id does not fit a model of `vocab_size`, or is the mask token, which is no text.

        Without a manifest a sample of the data is read now; every sequence is checked as it is built.
        """
        self._vocab_size, self._mask_token_id = vocab_size, mask_token_id
        self._check_largest(self.stored.max_token_id)
        for chunk in () if self.stored.manifest else self.stored.sample():
            self._check_ids(chunk)

    def check_tokenizer(self, tokenizer_fingerprint: str) -> None:
        """Raise UserError if the data were made by another tokenizer; without a manifest this is unknown."""
        manifest = self.stored.manifest
        if manifest and manifest.tokenizer_fingerprint != tokenizer_fingerprint:
            theirs, given = manifest.tokenizer_fingerprint[:12], tokenizer_fingerprint[:12]
            raise UserError(
                f"{self.stored.path} was tokenised with tokenizer {theirs}, data.tokenizer is {given}: prepare the "
                "data again, or set data.tokenizer to the one that made them."
            )

    def _check_enough(self) -> None:
        length, path = self.form.sequence_length, self.stored.path
        if not self.num_sequences:
            other = "" if self.form.overlong_chats is OverlongChat.truncate else ", or set data.overlong_chats=truncate"
            raise UserError(
                f"{path}: no chat fits into data.sequence_length={length} with a response; raise it{other}."
            )
        if self.stored.kind is DocumentKind.text and self.stored.num_tokens < length:
            raise UserError(
                f"{path} holds {self.stored.num_tokens} tokens, fewer than one sequence of {length}: use "
                "more data or a smaller data.sequence_length."
            )

    def _check_ids(self, tokens: np.ndarray) -> None:
        self._check_largest(int(tokens.max()))
        if (smallest := int(tokens.min())) < 0:
            raise UserError(
                f"{self.stored.path} contains token id {smallest}: ids are not negative; tokenise it again."
            )
        if self._mask_token_id is not None and (tokens == self._mask_token_id).any():
            raise UserError(
                f"{self.stored.path} contains the mask token (id {self._mask_token_id}), which stands for what is "
                "predicted and is no text: tokenise it without reserved tokens, or choose another data.mask_token."
            )

    def _check_largest(self, largest: int) -> None:
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise UserError(
                f"{self.stored.path} contains token id {largest}, the model has vocab_size {self._vocab_size}: "
                "use the model's own tokenizer for the data, or a model with that vocabulary."
            )


ORDER_VERSION = 1  # of everything that maps a sample index to tokens: blend, permutation, packing


@dataclass(frozen=True)
class Blend:
    """Mix several sources. sources: by name, as the first sources of `order`, which says when each is read."""

    sources: dict[str, TokenDataset]
    order: BlendOrder

    def locate(self, sample_index: int) -> tuple[str, int]:
        """Return the name of a sample's source, and the number of the sequence within that source."""
        source, number = self.order.locate(sample_index)
        return self.order.sources[source].name, number

    def outline(self, sample_index: int) -> Outline:
        """Return the outline of the sequence at a global sample index; no token is read."""
        name, number = self.locate(sample_index)
        return self.sources[name].outline(number)

    def build_batch(self, sample_indices: Sequence[int]) -> Batch:
        """Batch [B, S] of the sequences at B global sample indices, on the CPU."""
        sequences = []
        for sample_index in sample_indices:
            name, number = self.locate(int(sample_index))
            sequences.append(self.sources[name].build_sequence(number, int(sample_index)))
        return stack_batches(sequences)

    @property
    def num_samples_without_repeats(self) -> int:
        """Return the number of samples after which the first source has been read once."""
        unread = (int(max(0, source.sequences - source.read) / source.share) for source in self.order.live)
        return self.order.first_sample + min(unread)

    def shares(self) -> dict[str, float]:
        """Return the share of every source, 0..1."""
        return {source.name: source.share for source in self.order.live}

    def epochs(self, num_samples: int) -> dict[str, float]:
        """Return how often each source is read in the first `num_samples` samples (exact at the end of a round)."""
        ahead = num_samples - self.order.first_sample
        return {source.name: (source.read + ahead * source.share) / source.sequences for source in self.order.live}

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the tokens of a source's sequences, for checkpoints; `order` says which are read."""
        form = next(iter(self.sources.values())).form
        return {
            "order": ORDER_VERSION,
            "seed": self.order.seed,
            "sequence_length": form.sequence_length,
            "alignment": form.alignment,
            "isolate_documents": form.isolate_documents,
            "overlong_chats": form.overlong_chats.value,
        }


def build_blend(sources: dict[str, TokenDataset], configs: dict[str, SourceConfig], seed: int) -> Blend:
    """Build the blend of `sources` with the weights or token budgets that `configs` gives them, from sample 0.

    The order does not depend on names, nor on which source is named first.
    Raises UserError for a source whose share is less than one slot.
    """
    names = sorted(sources, key=lambda name: (sources[name].stored.sha256, name))
    weights = np.array([float(configs[name].weight or configs[name].tokens or 1) for name in names])
    slots = _round_to_slots(weights / weights.sum())
    for name, count in zip(names, slots, strict=True):
        if not count:
            raise UserError(
                f"the source {name} has a share below 1/{sample_order.ROUND_SLOTS} of the blend: raise its weight or "
                "leave it out."
            )
    orders = (
        SourceOrder(sources[name].stored.sha256, name, int(count), sources[name].num_sequences)
        for name, count in zip(names, slots, strict=True)
    )
    return Blend({name: sources[name] for name in names}, BlendOrder(seed, tuple(orders)))


def _round_to_slots(shares: np.ndarray) -> np.ndarray:
    """Return whole slots that sum to a round; the largest remainders are rounded up."""
    exact = shares * sample_order.ROUND_SLOTS
    slots = np.floor(exact).astype(np.int64)
    missing = sample_order.ROUND_SLOTS - int(slots.sum())
    slots[np.argsort(slots - exact, kind="stable")[:missing]] += 1
    return slots
