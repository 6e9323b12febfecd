"""A small tokenizer and datasets made by the real pipeline, shared by the tests of this folder."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from conf.schema import DataConfig, InputConfig, PrepareConfig, SourceConfig
from data_pipeline.prepare.run import prepare_source
from data_pipeline.toy.tokenizer import save_tokenizer, train_tokenizer
from tests.helpers.pictures import ImageWorkshop

TEXTS = [f"def function_{i}(x):\n    return x + {i}  # the {i}th of them\n" * 4 for i in range(40)]
SHARD_BYTES = 3000  # the texts become several shards


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Return the documents of `dataset_dir` and `own_dataset_dir`."""
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    save_tokenizer(train_tokenizer(TEXTS, vocab_size=370), directory)
    return directory


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Prepare a dataset of 40 documents in several shards; tests must not write to it."""
    folder = tmp_path_factory.mktemp("data")
    files = write_jsonl(folder / "texts.jsonl", TEXTS)
    source = SourceConfig(path=str(folder / "tokens"), input=InputConfig(files=str(files)))
    prepare_source("texts", source, data_config(tokenizer_dir))
    return folder / "tokens"


@pytest.fixture
def own_dataset_dir(tmp_path: Path, dataset_dir: Path) -> Path:
    """Copy `dataset_dir` for a test that may break it."""
    return Path(shutil.copytree(dataset_dir, tmp_path / "own"))


def data_config(tokenizer_dir: Path) -> DataConfig:
    """Return a configuration with small shards and one worker."""
    return DataConfig(tokenizer=str(tokenizer_dir), prepare=PrepareConfig(workers=1, shard_bytes=SHARD_BYTES))


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """Write one record {"text": ...} per text."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def image_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tokenizer with the tokens of images; tests must not write to it."""
    directory = tmp_path_factory.mktemp("tokenizer") / "with_images"
    texts = [f"What is picture {i}? It shows {i} things, and the {i}th of them is green.\n" for i in range(40)]
    save_tokenizer(train_tokenizer(texts, vocab_size=400, with_images=True), directory)
    return directory


@pytest.fixture
def image_workshop(tmp_path: Path, image_tokenizer_dir: Path) -> ImageWorkshop:
    return ImageWorkshop(tmp_path, image_tokenizer_dir)
