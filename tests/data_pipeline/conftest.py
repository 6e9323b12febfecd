"""A small tokenizer and datasets made by the real pipeline, shared by the tests of this folder."""

from pathlib import Path

import pytest

from data_pipeline.prepare import prepare_dataset
from data_pipeline.tokenizer import MASK_TOKEN, save_tokenizer, train_tokenizer

TEXTS = [f"def function_{i}(x):\n    return x + {i}  # the {i}th of them\n" * 4 for i in range(40)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """The documents of `prefix` and `own_prefix`."""
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    save_tokenizer(train_tokenizer(TEXTS, vocab_size=370), directory)
    return directory


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Prefix of a dataset of 40 documents; tests must not write to it."""
    path = tmp_path_factory.mktemp("data") / "train"
    prepare_dataset(TEXTS, tokenizer_dir, MASK_TOKEN, path, num_documents=len(TEXTS))
    return path


@pytest.fixture
def own_prefix(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """Prefix of a dataset a test may break."""
    path = tmp_path / "own"
    prepare_dataset(TEXTS, tokenizer_dir, MASK_TOKEN, path, num_documents=len(TEXTS))
    return path
