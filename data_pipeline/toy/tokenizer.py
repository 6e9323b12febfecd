"""Train a small byte-level BPE tokenizer whose reserved ids are those of the released model family."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conf.system.atomic import atomic_directory
from conf.system.errors import UserError
from model.hf.image_tokens import IMAGE_TOKENS

NAMED_TOKENS = {0: "<unk>", 1: "<s>", 2: "</s>", 10: "<|im_start|>", 11: "<|im_end|>", 12: "<think>", 13: "</think>"}
MASK_TOKEN = "<SPECIAL_100>"
NUM_RESERVED = 101  # ids 0..100; the last one is the mask token
SMALLEST_VOCABULARY = NUM_RESERVED + 256  # reserved tokens and one token per byte


def reserved_tokens(with_images: bool = False) -> list[str]:
    """Return the reserved tokens in the order of their ids, named as in the family, else `<SPECIAL_n>`.

    with_images: as in the vision-language variant of the family.
    """
    named = NAMED_TOKENS | ({token_id: token for token, token_id in IMAGE_TOKENS.items()} if with_images else {})
    return [named.get(i, f"<SPECIAL_{i}>") for i in range(NUM_RESERVED)]


def train_tokenizer(texts: Iterable[str], vocab_size: int, with_images: bool = False) -> PreTrainedTokenizerFast:
    """Train a BPE of exactly `vocab_size` entries, reserved tokens included, that encodes any text without `<unk>`.

    with_images: it has the tokens that stand for images.

    Text that spells a reserved token is encoded as plain bytes only if the caller asks for it
    (`split_special_tokens=True`), as everywhere in transformers.

    Raises UserError when the vocabulary is too small for reserved tokens and bytes, or the text for its merges.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size {vocab_size} is too small: {NUM_RESERVED} reserved tokens and 256 bytes need "
            f"{SMALLEST_VOCABULARY}."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=reserved_tokens(with_images),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocab_size:
        raise UserError(
            f"The text gives only {backend.get_vocab_size()} tokens, not {vocab_size}: use more text or a "
            "smaller vocab_size."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=NAMED_TOKENS[1],
        eos_token=NAMED_TOKENS[2],
        unk_token=NAMED_TOKENS[0],
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write Hugging Face tokenizer files to `directory`, complete or not at all; a former directory is replaced."""
    with atomic_directory(directory, replace=True) as partial:
        tokenizer.save_pretrained(partial)


def unigram_entropy(train_counts: np.ndarray, heldout_counts: np.ndarray) -> float:
    """Return the unigram entropy of held-out text in nats per token: what a model without context could reach.

    It is the cross entropy -sum_v h(v) log q(v), where h is the distribution of tokens in the held-out text and
    q(v) = (c(v) + 1) / sum_u (c(u) + 1) the add-one smoothed distribution of tokens in the training text.

    train_counts, heldout_counts: [vocab_size] occurrences of every token id.
    """
    smoothed = train_counts + 1.0
    log_probabilities = np.log(smoothed / smoothed.sum())
    return float(-(heldout_counts * log_probabilities).sum() / heldout_counts.sum())
