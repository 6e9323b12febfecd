"""A tokenizer directory is read as the tokenizers library reads it, without importing that library."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

from conf.system.errors import UserError
from conf.tokenizer_info import read_tokenizer_info, token_text

MASK = "<SPECIAL_100>"


def save_tokenizer(directory: Path) -> Tokenizer:
    """Save a tiny byte-level BPE with 101 reserved tokens, the last being the mask."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    special = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 101))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["def add(a, b):\n    return a + b\n"] * 3, trainer)
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def test_ids_and_sizes_are_those_of_the_tokenizers_library(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    info = read_tokenizer_info(tmp_path, MASK)
    assert info.vocab_size == tokenizer.get_vocab_size() == max(tokenizer.get_vocab().values()) + 1
    assert info.mask_token_id == tokenizer.token_to_id(MASK) == 100
    assert (info.bos_token_id, info.eos_token_id) == (1, 2)


def test_a_token_is_found_by_its_id(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    assert token_text(tmp_path, 100) == MASK
    last = tokenizer.get_vocab_size() - 1
    assert token_text(tmp_path, last) == tokenizer.id_to_token(last)
    with pytest.raises(UserError, match="no token with id 9999"):
        token_text(tmp_path, 9999)


def test_tokens_added_later_count(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    before = read_tokenizer_info(tmp_path, MASK)
    tokenizer.add_special_tokens(["<late>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    after = read_tokenizer_info(tmp_path, "<late>")
    assert after.vocab_size == before.vocab_size + 1 and after.mask_token_id == before.vocab_size
    assert after.fingerprint != before.fingerprint


def test_unigram_vocabularies_are_numbered_by_position(tmp_path):
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), (MASK, -2.0)], 0))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="an ordinary entry of the vocabulary"):
        read_tokenizer_info(tmp_path, MASK)
    tokenizer.add_special_tokens([MASK])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    info = read_tokenizer_info(tmp_path, MASK)
    assert (info.vocab_size, info.mask_token_id, info.eos_token_id) == (3, 2, None)


def test_the_fingerprint_ignores_spelling_and_call_settings_only(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    first = read_tokenizer_info(tmp_path, MASK).fingerprint
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(max_length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"), pretty=False)
    assert read_tokenizer_info(tmp_path, MASK).fingerprint == first


def test_a_directory_without_tokenizer_json_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        read_tokenizer_info(tmp_path, MASK)


def test_a_missing_mask_token_is_named_with_the_remedy(tmp_path):
    save_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"no mask token '<MASK>'.*data\.mask_token"):
        read_tokenizer_info(tmp_path, "<MASK>")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"vocab": {}}}', '{"model": {"vocab": [1]}}'])
def test_a_damaged_file_is_one_clear_error(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        read_tokenizer_info(tmp_path, MASK)


def test_reading_needs_no_library(tmp_path):
    save_tokenizer(tmp_path)
    code = (
        "import sys; from conf.tokenizer_info import read_tokenizer_info\n"
        f"read_tokenizer_info({str(tmp_path)!r}, {MASK!r})\n"
        "assert not {'torch', 'transformers', 'tokenizers', 'omegaconf'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
