"""Examples of tokenised documents: windows of texts and beginnings of chats, read from the memory map on demand.

Chats may have images. Their files are opened when a batch is encoded.
"""

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
from model.export.images import PromptImage, load_image_processor
from model.export.load import read_model_type
from model.export.shipped_code import VLM_TYPE
from model.hf.image_processing_nemotron_labs_diffusion_vlm import NemotronLabsDiffusionVLMImageProcessor

EXAMPLES_VERSION = 1  # goes up when the same tokens make other examples
logger = logging.getLogger(__name__)


class StoredExamples(ExampleSet):
    """Examples of a dataset on disk.

    kind: of the documents. places: [n, 4] int64, in order; for each example its shard, its document, its first token
    and the number of its tokens. processor: prepares the images of chats; None where there are none.
    """

    def __init__(
        self,
        stored: StoredTokens,
        sequence_length: int,
        places: np.ndarray,
        fingerprint: str,
        processor: NemotronLabsDiffusionVLMImageProcessor | None = None,
    ) -> None:
        self.kind, self.sequence_length, self.fingerprint = stored.kind, sequence_length, fingerprint
        self._stored, self._places, self._processor = stored, places, processor

    @property
    def has_images(self) -> bool:
        """Whether examples may have images."""
        return self._processor is not None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        number, document, offset, count = map(int, self._places[index])
        shard = self._stored.open_shard(number)
        if not self.kind.is_chat:
            return Example(shard.read(document, offset, count), np.arange(count) > 0)
        lengths = shard.segment_lengths(*shard.segment_bounds(document, document + 1))
        ends = np.cumsum(lengths)
        if shard.images is not None:  # an image is used as a whole or not at all, so no prompt is cut
            last = int(np.searchsorted(ends, count))
            count = count if last % 2 == 1 or ends[last] == count else int(ends[last - 1])
        drafted = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)[:count]
        return Example(shard.read(document, offset, count), drafted, self._list_images(shard, document, ends, count))

    def _list_images(self, shard: Shard, document: int, ends: np.ndarray, count: int) -> tuple[PromptImage, ...]:
        """List the images of a chat that stand in its first `count` tokens. ends: of its segments, in tokens."""
        if shard.images is None or self._processor is None:
            return ()
        references = shard.images.read(document, document + 1)
        used = references[ends[references["segment"]] <= count]
        grids = zip(used["height"].tolist(), used["width"].tolist(), strict=True)
        pictures = zip(self._stored.list_images(used), grids, strict=True)
        return tuple(PromptImage(picture.read, grid, self._processor) for picture, grid in pictures)

    def select(self, chosen: np.ndarray, name: str) -> "StoredExamples":
        """Return the examples where `chosen` [n] bool is true. name: describes the choice, for the fingerprint."""
        places = self._places[chosen]
        fingerprint = hash_values(self.fingerprint, name)
        return StoredExamples(self._stored, self.sequence_length, places, fingerprint, self._processor)

    def hash_documents(self) -> np.ndarray:
        """Return [n] uint64: for each example a hash of its whole document's tokens and images; all tokens are read."""
        is_first = np.append(True, (np.diff(self._places[:, :2], axis=0) != 0).any(axis=1))
        hashes = [self._hash_document(shard, document) for shard, document in self._places[is_first, :2].tolist()]
        return np.array(hashes, dtype=np.uint64)[np.cumsum(is_first) - 1]

    def _hash_document(self, number: int, document: int) -> int:
        shard = self._stored.open_shard(number)
        length = int(shard.segment_lengths(*shard.segment_bounds(document, document + 1)).sum())
        tokens = shard.read(document, 0, length)
        if shard.images is None:
            return hash_tokens(tokens)
        pictures = np.frombuffer(shard.images.read(document, document + 1)["sha256"].tobytes(), "<i8")
        return hash_tokens(np.concatenate([tokens.astype("<i8"), pictures]))


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
    find_places = _find_chats if stored.kind.is_chat else _cut_windows
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
    processor = load_image_processor(checkpoint) if stored.kind is DocumentKind.image_chat else None
    return StoredExamples(stored, sequence_length, places, fingerprint, processor)


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
    if stored.kind is DocumentKind.image_chat and read_model_type(checkpoint) != VLM_TYPE:
        raise UserError(
            f"{stored.path} holds chats with images, but {checkpoint} reads text alone: take one with images"
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
    if not stored.kind.is_chat or stored.manifest is None:
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
