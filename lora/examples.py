"""Sequences to draft in: windows of tokenised documents, read from the memory map when they are asked for."""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from conf.schema import DocumentKind
from conf.system.errors import UserError
from conf.tokenizer_info import read_tokenizer_info, token_text
from data_pipeline.chat.template import load_chat_template
from data_pipeline.order import derive_key, permute
from data_pipeline.storage.tokens import Shard, StoredTokens
from lora.rows import find_tokens, read_checkpoint_value

VERSION = 1  # of what an example is
HASH_BYTES = 8
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One sequence.

    tokens: [n] int64, 2 <= n <= sequence_length. drafted: [n] bool, tokens that may be drafted: of a text all but the
    first, of a chat those of answers, end of turn included; at least one.
    """

    tokens: np.ndarray
    drafted: np.ndarray


class ExampleSet(ABC):
    """Examples by number.

    sequence_length: tokens of the longest possible example. fingerprint: hash of what decides the examples and their
    order.
    """

    sequence_length: int
    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Example `index` (0 <= index < len)."""

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


class Selectable(Protocol):
    """What can be split and chosen from: examples, or prompts of them."""

    def __len__(self) -> int: ...

    def select(self, chosen: np.ndarray, name: str) -> Self:
        """Those where `chosen` [n] bool. name: what they are."""
        ...

    def hash_documents(self) -> np.ndarray:
        """[n] uint64, of each a hash of the whole document it is of."""
        ...


class StoredExamples(ExampleSet):
    """Examples of a dataset on disk.

    kind: of the documents.
    places: [n, 4] int64, of each example: shard, document, its first token and the number of its tokens; in order.
    """

    def __init__(self, stored: StoredTokens, sequence_length: int, places: np.ndarray, fingerprint: str) -> None:
        self.kind, self.sequence_length, self.fingerprint = stored.kind, sequence_length, fingerprint
        self._stored, self._places = stored, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        number, document, offset, count = map(int, self._places[index])
        shard = self._stored.open_shard(number)
        drafted = np.ones(count, dtype=bool)
        if self.kind is DocumentKind.chat:
            lengths = shard.segment_lengths(*shard.segment_bounds(document, document + 1))
            drafted = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)[:count]
        else:
            drafted[0] = False
        return Example(shard.read(document, offset, count), drafted)

    def select(self, chosen: np.ndarray, name: str) -> "StoredExamples":
        """The examples where `chosen` [n] bool. name: what they are, for the fingerprint."""
        places = self._places[chosen]
        return StoredExamples(self._stored, self.sequence_length, places, hash_values(self.fingerprint, name))

    def hash_documents(self) -> np.ndarray:
        """[n] uint64, of every example a hash of its whole document's tokens; reads all of them."""
        is_first = np.append(True, (np.diff(self._places[:, :2], axis=0) != 0).any(axis=1))
        hashes = [self._hash_document(shard, document) for shard, document in self._places[is_first, :2].tolist()]
        return np.array(hashes, dtype=np.uint64)[np.cumsum(is_first) - 1]

    def _hash_document(self, number: int, document: int) -> int:
        shard = self._stored.open_shard(number)
        length = int(shard.segment_lengths(*shard.segment_bounds(document, document + 1)).sum())
        return hash_tokens(shard.read(document, 0, length))


def open_examples(
    path: Path | str, *, checkpoint: Path, sequence_length: int, folder: Path, checks_files: bool = True
) -> StoredExamples:
    """Examples of `path`, whose rows prepare_examples tokenised into `folder` where it holds rows.

    Texts are cut into consecutive windows of sequence_length tokens, chats keep their beginning; what has no token to
    draft is left out. checks_files: compare the files with their manifest, which one process of many needs to do.

    Raises: UserError if the tokens are missing, damaged, of another tokenizer than the checkpoint's or do not fit its
    vocabulary, and if there is no example.
    """
    assert sequence_length >= 2
    stored = StoredTokens(find_tokens(path, folder))
    _check_tokens(stored, checkpoint)
    if checks_files:
        for number in range(stored.num_shards):
            stored.stamp(number)
            stored.verify(number, was_known=False)
    find_places = _find_answers if stored.kind is DocumentKind.chat else _cut_windows
    found = [find_places(stored.open_shard(number), sequence_length) for number in range(stored.num_shards)]
    places = np.concatenate([np.insert(part, 0, number, axis=1) for number, (part, _) in enumerate(found)])
    left_out = sum(count for _, count in found)
    if not len(places):
        raise UserError(_explain_nothing(stored, sequence_length))
    logger.info(
        "%s: %d sequences; left out %d without a token to draft within %d tokens",
        stored.path, len(places), left_out, sequence_length,
    )  # fmt: skip
    return StoredExamples(stored, sequence_length, places, hash_values(VERSION, stored.sha256, sequence_length))


def split_heldout[T: Selectable](examples: T, share: float) -> tuple[T, T]:
    """(train, heldout): about `share` (0..1) of the documents are held out, whole and with all their copies.

    The hash of a document's tokens decides: neither the order of the documents nor other ones matter, but each side has
    at least one. Raises: UserError if there are not two different documents.
    """
    assert 0 < share < 1
    hashes = examples.hash_documents()
    distinct = np.unique(hashes)
    if len(distinct) < 2:
        raise UserError(
            "the data hold a single document (copies count as one), of which none can be held out: give more rows, or "
            "others as heldout=FILE"
        )
    wanted = int((distinct < np.uint64(share * 2 ** (8 * HASH_BYTES))).sum())
    is_heldout = hashes <= distinct[min(max(wanted, 1), len(distinct) - 1) - 1]
    name = f"{share!r} of the documents"
    return examples.select(~is_heldout, f"without {name}"), examples.select(is_heldout, name)


def select_examples[T: Selectable](examples: T, count: int, seed: int) -> T:
    """A random choice of `count` examples, in their order; all of them if there are no more."""
    if count >= len(examples):
        return examples
    chosen = np.zeros(len(examples), dtype=bool)
    key = derive_key(seed, len(examples))
    chosen[[permute(place, len(examples), key) for place in range(count)]] = True
    return examples.select(chosen, f"{count} chosen with seed {seed}")


def hash_tokens(tokens: np.ndarray) -> int:
    """64 bits that depend on the tokens alone."""
    return int.from_bytes(hashlib.blake2b(tokens.astype("<i8").tobytes(), digest_size=HASH_BYTES).digest())


def hash_values(*values: object) -> str:
    """Hexadecimal SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _check_tokens(stored: StoredTokens, checkpoint: Path) -> None:
    """Raises: UserError unless the tokens are of the checkpoint's tokenizer and within its model's vocabulary."""
    mask_token = token_text(checkpoint, read_checkpoint_value(checkpoint, "mask_token_id"))
    own = read_tokenizer_info(checkpoint, mask_token).fingerprint
    theirs = stored.manifest.tokenizer_fingerprint if stored.manifest else "of another tool"
    if theirs != own:
        raise UserError(
            f"{stored.path} was tokenised with tokenizer {theirs[:12]}, that of the checkpoint {checkpoint} is "
            f"{own[:12]}: prepare the data with data.tokenizer={checkpoint}, or give the rows themselves"
        )
    vocab_size = read_checkpoint_value(checkpoint, "vocab_size")
    if stored.max_token_id >= vocab_size:
        raise UserError(
            f"{stored.path} contains token id {stored.max_token_id}, but {checkpoint} has vocab_size {vocab_size}: its "
            "tokenizer is not the model's"
        )
    _warn_of_template(stored, checkpoint)


def _warn_of_template(stored: StoredTokens, checkpoint: Path) -> None:
    """Chats in another template than the checkpoint's are drafted otherwise than it will be asked to."""
    if stored.kind is not DocumentKind.chat or stored.manifest is None:
        return
    theirs = stored.manifest.settings.get("encoder", {}).get("chat_template")
    try:
        own = load_chat_template(checkpoint, None)
    except UserError:  # it has none
        return
    if theirs not in (None, own):
        logger.warning("%s was rendered with another chat template than that of %s", stored.path, checkpoint)


def _cut_windows(shard: Shard, sequence_length: int) -> tuple[np.ndarray, int]:
    """Places [n, 3] (document, first token, tokens) of the windows of all texts; how many of one token are left out."""
    lengths = shard.document_lengths(0, shard.num_documents)
    num_windows = -(-lengths // sequence_length)
    document = np.repeat(np.arange(len(lengths)), num_windows)
    first_windows = np.repeat(np.cumsum(num_windows) - num_windows, num_windows)
    offset = (np.arange(len(document)) - first_windows) * sequence_length
    count = np.minimum(sequence_length, lengths[document] - offset)
    return _keep(document, offset, count, count >= 2)


def _find_answers(shard: Shard, sequence_length: int) -> tuple[np.ndarray, int]:
    """Places [n, 3] of the beginnings of all chats; how many are left out because no answer begins in time."""
    lengths = shard.document_lengths(0, shard.num_documents)
    bounds = shard.segment_bounds(0, shard.num_documents)
    first_context = shard.segment_lengths(bounds[0], bounds[-1])[bounds[:-1] - bounds[0]]
    count = np.minimum(sequence_length, lengths)
    document = np.arange(len(lengths))
    return _keep(document, np.zeros_like(document), count, first_context < count)


def _keep(document: np.ndarray, offset: np.ndarray, count: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, int]:
    places = np.stack([document, offset, count], axis=1).astype(np.int64)
    return places[kept], int((~kept).sum())


def _explain_nothing(stored: StoredTokens, sequence_length: int) -> str:
    if stored.kind is DocumentKind.text:
        return f"{stored.path} holds nothing to draft: no text of it has two tokens"
    return (
        f"{stored.path} holds nothing to draft: in no chat an answer begins within train.sequence_length="
        f"{sequence_length} tokens; raise it or give shorter chats"
    )
