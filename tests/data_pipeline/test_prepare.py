"""Datasets on disk are readable by megatron-core itself and appear complete or not at all."""

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from conf.errors import UserError
from conf.tokenizer_info import read_tokenizer_info
from data_pipeline.manifest import bin_path, compute_sha256, index_path, load_manifest, manifest_path
from data_pipeline.prepare import prepare_dataset
from data_pipeline.tokenizer import MASK_TOKEN


def read_documents(prefix: Path) -> list[list[int]]:
    """Token ids of every document as megatron-core reads them (copied: its arrays die with the dataset)."""
    dataset = IndexedDataset(str(prefix))
    return [np.asarray(dataset[i]).tolist() for i in range(len(dataset))]


def test_megatron_core_reads_the_ids_that_transformers_encodes(
    prefix: Path, tokenizer_dir: Path, texts: list[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    documents = read_documents(prefix)
    assert len(documents) == len(texts)
    for stored, text in zip(documents, texts, strict=True):
        assert stored == [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def test_manifest_describes_the_files(prefix: Path, tokenizer_dir: Path, texts: list[str]) -> None:
    manifest = load_manifest(prefix)
    tokens = np.fromfile(bin_path(prefix), dtype=np.uint16)
    assert manifest is not None
    assert (manifest.documents, manifest.tokens, manifest.dtype) == (len(texts), len(tokens), "uint16")
    assert manifest.max_token_id == tokens.max()
    assert manifest.sha256 == compute_sha256(bin_path(prefix))
    assert manifest.tokenizer_fingerprint == read_tokenizer_info(tokenizer_dir, MASK_TOKEN).fingerprint


def test_text_that_spells_a_reserved_token_stays_text(tmp_path: Path, tokenizer_dir: Path) -> None:
    text = "<s> <SPECIAL_100> </s>"
    prepare_dataset([text], tokenizer_dir, MASK_TOKEN, tmp_path / "d", num_documents=1)
    [ids] = read_documents(tmp_path / "d")
    assert min(ids[:-1]) > 100
    assert AutoTokenizer.from_pretrained(tokenizer_dir).decode(ids[:-1]) == text


def test_same_input_gives_the_same_bytes(prefix: Path, own_prefix: Path) -> None:
    for path in (bin_path, index_path, manifest_path):
        assert path(prefix).read_bytes() == path(own_prefix).read_bytes()


def test_an_interrupted_run_leaves_no_index(own_prefix: Path, tokenizer_dir: Path) -> None:
    def interrupted():
        yield "one document"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(interrupted(), tokenizer_dir, MASK_TOKEN, own_prefix, num_documents=2)
    assert not index_path(own_prefix).exists()


def test_no_documents_are_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(UserError, match="no document"):
        prepare_dataset([], tokenizer_dir, MASK_TOKEN, tmp_path / "d", num_documents=0)
    assert not index_path(tmp_path / "d").exists()


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        prepare_dataset(["text"], tmp_path, MASK_TOKEN, tmp_path / "d", num_documents=1)


def test_a_tokenizer_without_the_mask_token_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(ValueError, match="mask"):
        prepare_dataset(["text"], tokenizer_dir, "<MASK>", tmp_path / "d", num_documents=1)
