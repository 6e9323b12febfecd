"""Preparing small files in a folder of the test's own."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from conf.schema import DataConfig, InputConfig, PrepareConfig, SourceConfig
from data_pipeline.prepare.run import SourceReport, report_source
from data_pipeline.storage.manifest import load_manifest


@dataclass
class Workshop:
    """prepare(...) makes `folder`/out from `folder`/in or what `files` says."""

    folder: Path
    tokenizer_dir: Path
    settings: dict[str, Any] = field(default_factory=lambda: {"workers": 1, "shard_bytes": 3000})

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def write(self, name: str, content: bytes | Iterable[Any]) -> Path:
        """Write a file below `folder`/in: bytes as they are, else one line of JSON per value."""
        path = self.folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes):
            content = "".join(json.dumps(value) + "\n" for value in content).encode()
        path.write_bytes(content)
        return path

    def data(self, **settings: Any) -> DataConfig:
        return DataConfig(tokenizer=str(self.tokenizer_dir), prepare=PrepareConfig(**(self.settings | settings)))

    def source(self, output: Path | None = None, **input_: Any) -> SourceConfig:
        where: dict[str, Any] = {} if "dataset" in input_ else {"files": str(self.folder / "in")}
        return SourceConfig(path=str(output or self.output), input=InputConfig(**(where | input_)))

    def prepare(
        self, output: Path | None = None, input_: dict[str, Any] | None = None, **settings: Any
    ) -> SourceReport:
        return report_source("web", self.source(output, **(input_ or {})), self.data(**settings))


@pytest.fixture
def workshop(tmp_path: Path, tokenizer_dir: Path) -> Workshop:
    return Workshop(tmp_path, tokenizer_dir)


@pytest.fixture(scope="session")
def records(texts: list[str]) -> list[dict[str, str]]:
    return [{"id": str(i), "text": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def read_documents() -> Callable[[Path], list[list[int]]]:
    """Return a function that reads the token ids of every document as megatron-core reads a dataset's shards."""

    def read(directory: Path) -> list[list[int]]:
        documents = []
        for shard in load_manifest(directory).shards:
            dataset = IndexedDataset(str(directory / shard.name))
            documents += [np.asarray(dataset[i]).tolist() for i in range(len(dataset))]
        return documents

    return read


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Return a function that reads the content of every file of a folder."""
    return lambda folder: {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
