"""What an example is, and how sets of examples are split, chosen from and ordered."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from conf.system.errors import UserError
from data_pipeline.order import derive_key, permute
from model.export.images import PromptImage

HASH_BYTES = 8


@dataclass(frozen=True)
class Example:
    """One sequence of tokens with the ones that may be drafted.

    tokens: [n] int64, 2 <= n <= sequence_length. drafted: [n] bool, tokens that may be drafted; at least one. In a text
    these are all but the first, in a chat those of the responses, end of turn included. images: those whose tokens the
    sequence has, in their order.
    """

    tokens: np.ndarray
    drafted: np.ndarray
    images: tuple[PromptImage, ...] = ()


class ExampleSet(ABC):
    """Examples by number.

    sequence_length: tokens of the longest possible example. fingerprint: hash of everything that decides the examples
    and their order.
    """

    sequence_length: int
    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Return example `index` (0 <= index < len)."""

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


class Selectable(Protocol):
    """A set that can be split and chosen from: examples, or prompts."""

    def __len__(self) -> int: ...

    def select(self, chosen: np.ndarray, name: str) -> Self:
        """Return the members where `chosen` [n] bool is true. name: describes the choice, for the fingerprint."""
        ...

    def hash_documents(self) -> np.ndarray:
        """Return [n] uint64: for each member a hash of the whole document it comes from."""
        ...


def split_heldout[T: Selectable](examples: T, share: float) -> tuple[T, T]:
    """Split into (train, heldout), with about `share` (0..1) of the documents held out whole, with all their copies.

    The hash of a document's tokens decides, so neither the order of the documents nor other documents matter. Each side
    has at least one document.

    Raises: UserError if there are not two different documents.
    """
    assert 0 < share < 1
    hashes = examples.hash_documents()
    distinct = np.unique(hashes)
    if len(distinct) < 2:
        raise UserError(
            "the data hold a single document (copies count as one), so none can be held out: give more records, or "
            "held-out ones as heldout=FILE"
        )
    wanted = int((distinct < np.uint64(share * 2 ** (8 * HASH_BYTES))).sum())
    is_heldout = hashes <= distinct[min(max(wanted, 1), len(distinct) - 1) - 1]
    name = f"{share!r} of the documents"
    return examples.select(~is_heldout, f"without {name}"), examples.select(is_heldout, name)


def select_examples[T: Selectable](examples: T, count: int, seed: int) -> T:
    """Choose `count` examples at random and keep their order; return all if there are no more than that."""
    if count >= len(examples):
        return examples
    chosen = np.zeros(len(examples), dtype=bool)
    key = derive_key(seed, len(examples))
    chosen[[permute(place, len(examples), key) for place in range(count)]] = True
    return examples.select(chosen, f"{count} chosen with seed {seed}")


class ExampleOrder:
    """The endless order in which a run reads its examples: every epoch is a permutation of its own.

    A pure function of the key and the sample index, so it is the same under every layout.
    """

    def __init__(self, num_examples: int, key: int) -> None:
        self.num_examples, self._key = num_examples, key

    def find(self, sample_index: int) -> int:
        """Return the number of the example at a position of the order."""
        epoch, place = divmod(sample_index, self.num_examples)
        return permute(place, self.num_examples, derive_key(self._key, epoch))

    @staticmethod
    def share_out(first: int, count: int, micro_batch_size: int, rank: int, num_ranks: int) -> list[range]:
        """Return the sample indices of each microbatch of `rank`, among the `count` from sample index `first` on.

        count: a multiple of num_ranks * micro_batch_size.
        """
        assert count % (num_ranks * micro_batch_size) == 0
        starts = range(first + rank * micro_batch_size, first + count, num_ranks * micro_batch_size)
        return [range(start, start + micro_batch_size) for start in starts]


def hash_tokens(tokens: np.ndarray) -> int:
    """Return 64 bits that depend on the tokens alone."""
    return int.from_bytes(hashlib.blake2b(tokens.astype("<i8").tobytes(), digest_size=HASH_BYTES).digest())


def hash_values(*values: object) -> str:
    """Return the hexadecimal SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
