"""The tokenizer has the family's reserved ids and reads back any text.

The yardstick agrees with cross entropy as PyTorch computes it.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer

from conf.system.errors import UserError
from conf.tokenizer_info import read_tokenizer_info
from data_pipeline.toy.tokenizer import MASK_TOKEN, reserved_tokens, train_tokenizer, unigram_entropy


def test_reserved_ids_are_those_of_the_family(tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    wanted = {0: "<unk>", 1: "<s>", 2: "</s>", 10: "<|im_start|>", 11: "<|im_end|>", 12: "<think>", 13: "</think>"}
    assert {i: tokenizer.convert_ids_to_tokens(i) for i in wanted} == wanted
    assert tokenizer.convert_tokens_to_ids(MASK_TOKEN) == 100
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 370)


def test_configuration_code_finds_mask_and_end_of_sequence(tokenizer_dir: Path) -> None:
    info = read_tokenizer_info(tokenizer_dir, MASK_TOKEN)
    assert (info.mask_token_id, info.bos_token_id, info.eos_token_id, info.vocab_size) == (100, 1, 2, 370)


def test_any_text_survives_encoding_and_decoding(tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    text = "Grüße, 世界 \N{SNOWMAN}\t\x00\n  def f(): pass ."
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert min(ids) > 100, "text never becomes a reserved token"


def test_reserved_tokens_are_101_different_names() -> None:
    assert len(set(reserved_tokens())) == 101


@pytest.mark.parametrize(("vocab_size", "texts", "message"), [(300, ["abc"], "357"), (5000, ["abc abc"], "only")])
def test_a_vocabulary_that_cannot_be_trained_is_refused(vocab_size: int, texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, vocab_size)


def test_unigram_entropy_is_the_cross_entropy_of_a_constant_predictor() -> None:
    generator = torch.Generator().manual_seed(0)
    train, heldout = (torch.randint(0, high, (500,), generator=generator) for high in (9, 10))
    train_counts, heldout_counts = (np.bincount(tokens, minlength=12) for tokens in (train, heldout))
    logits = torch.log(torch.from_numpy(train_counts + 1.0)).expand(len(heldout), -1)
    assert np.isclose(unigram_entropy(train_counts, heldout_counts), functional.cross_entropy(logits, heldout).item())


def test_uniform_tokens_have_the_logarithm_of_their_number() -> None:
    counts = np.full(8, 1000)
    assert np.isclose(unigram_entropy(counts, counts), np.log(8))
