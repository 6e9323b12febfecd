"""Examples of tokenised documents: windows of texts and beginnings of chats, read from the memory map on demand."""

import logging
from pathlib import Path

import numpy as np

from conf.schema import DocumentKind
from conf.system.errors import UserError
from conf.tokenizer_info import read_tokenizer_info, token_text
from data_pipeline.chat.template import load_chat_template
from data_pipeline.storage.tokens import Shard, StoredTokens
from lora.examples.example_set import Example, ExampleSet, hash_tokens, hash_values
from lora.examples.records import find_tokens, read_checkpoint_value

EXAMPLES_VERSION = 1  # goes up when the same tokens make other examples
logger = logging.getLogger(__name__)


class StoredExamples(ExampleSet):
    """Examples of a dataset on disk.

    kind: of the documents. places: [n, 4] int64, in order; for each example its shard, its document, its first token
    and the number of its tokens.
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
        """Return the examples where `chosen` [n] bool is true. name: describes the choice, for the fingerprint."""
        places = self._places[chosen]
        return StoredExamples(self._stored, self.sequence_length, places, hash_values(self.fingerprint, name))

    def hash_documents(self) -> np.ndarray:
        """Return [n] uint64: for each example a hash of its whole document's tokens, all of which are read."""
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
    """Open the examples of `path`; if it holds records, prepare_examples has tokenised them into `folder`.

    Texts are cut into consecutive windows of sequence_length tokens, chats are cut off after as many. Examples without
    a token to draft are left out. checks_files: compare the files with their manifest; one process of many needs to.

    Raises: UserError if the tokens are missing or damaged, come from another tokenizer than the checkpoint's or do not
        fit its vocabulary, and if there is no example.
    """
    assert sequence_length >= 2
    stored = StoredTokens(find_tokens(path, folder))
    _check_tokens(stored, checkpoint)
    if checks_files:
        for number in range(stored.num_shards):
            stored.stamp(number)
            stored.verify(number, was_known=False)
    find_places = _find_chats if stored.kind is DocumentKind.chat else _cut_windows
    found = [find_places(stored.open_shard(number), sequence_length) for number in range(stored.num_shards)]
    places = np.concatenate([np.insert(part, 0, number, axis=1) for number, (part, _) in enumerate(found)])
    left_out = sum(count for _, count in found)
    if not len(places):
        raise UserError(_explain_nothing(stored, sequence_length))
    logger.info(
        "%s: %d sequences; left out %d without a token to draft within %d tokens",
        stored.path, len(places), left_out, sequence_length,
    )  # fmt: skip
    fingerprint = hash_values(EXAMPLES_VERSION, stored.sha256, sequence_length)
    return StoredExamples(stored, sequence_length, places, fingerprint)


def _check_tokens(stored: StoredTokens, checkpoint: Path) -> None:
    """Raise UserError unless the tokens come from the checkpoint's tokenizer and fit its model's vocabulary."""
    mask_token = token_text(checkpoint, read_checkpoint_value(checkpoint, "mask_token_id"))
    own = read_tokenizer_info(checkpoint, mask_token).fingerprint
    theirs = stored.manifest.tokenizer_fingerprint if stored.manifest else "of another tool"
    if theirs != own:
        raise UserError(
            f"{stored.path} was tokenised with tokenizer {theirs[:12]}, that of the checkpoint {checkpoint} is "
            f"{own[:12]}: prepare the data with data.tokenizer={checkpoint}, or give the records themselves"
        )
    vocab_size = read_checkpoint_value(checkpoint, "vocab_size")
    if stored.max_token_id >= vocab_size:
        raise UserError(
            f"{stored.path} contains token id {stored.max_token_id}, but {checkpoint} has vocab_size {vocab_size}: its "
            "tokenizer is not the model's"
        )
    _warn_of_template(stored, checkpoint)


def _warn_of_template(stored: StoredTokens, checkpoint: Path) -> None:
    """Warn if chats were rendered with another template than the one that decoding will use."""
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
    """Return the places [n, 3] (document, first token, tokens) of the windows of all texts.

    The second value counts the windows of one token, which are left out.
    """
    lengths = shard.document_lengths(0, shard.num_documents)
    num_windows = -(-lengths // sequence_length)
    document = np.repeat(np.arange(len(lengths)), num_windows)
    first_windows = np.repeat(np.cumsum(num_windows) - num_windows, num_windows)
    offset = (np.arange(len(document)) - first_windows) * sequence_length
    count = np.minimum(sequence_length, lengths[document] - offset)
    return _select_places(document, offset, count, count >= 2)


def _find_chats(shard: Shard, sequence_length: int) -> tuple[np.ndarray, int]:
    """Return the places [n, 3] of the beginnings of all chats.

    The second value counts the chats that are left out because no response begins within sequence_length tokens.
    """
    lengths = shard.document_lengths(0, shard.num_documents)
    bounds = shard.segment_bounds(0, shard.num_documents)
    first_prompt = shard.segment_lengths(bounds[0], bounds[-1])[bounds[:-1] - bounds[0]]
    count = np.minimum(sequence_length, lengths)
    document = np.arange(len(lengths))
    return _select_places(document, np.zeros_like(document), count, first_prompt < count)


def _select_places(
    document: np.ndarray, offset: np.ndarray, count: np.ndarray, chosen: np.ndarray
) -> tuple[np.ndarray, int]:
    places = np.stack([document, offset, count], axis=1).astype(np.int64)
    return places[chosen], int((~chosen).sum())


def _explain_nothing(stored: StoredTokens, sequence_length: int) -> str:
    if stored.kind is DocumentKind.text:
        return f"{stored.path} holds nothing to draft: none of its texts has two tokens"
    return (
        f"{stored.path} holds nothing to draft: in no chat a response begins within train.sequence_length="
        f"{sequence_length} tokens; raise it or give shorter chats"
    )
