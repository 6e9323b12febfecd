"""Datasets of given tokens, written by megatron-core's own builder: what the pipeline reads, without its writer."""

from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from data_pipeline.storage.manifest import (
    DatasetManifest,
    ShardManifest,
    bin_path,
    compute_sha256,
    index_path,
    save_manifest,
    save_shard_manifest,
)

EOS = 2
Document = list[list[int]]  # its segments


def random_texts(count: int, longest: int, seed: int = 0) -> list[Document]:
    """Draw one-segment documents of 1..longest tokens, the last one end-of-sequence; every token occurs once or so."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, count)
    return [[[*generator.integers(10, 60000, length - 1).tolist(), EOS]] for length in lengths]


def random_chats(count: int, longest: int, seed: int = 0) -> list[Document]:
    """Draw documents of one to three turns of prompt and response, each of 1..longest tokens."""
    generator = np.random.default_rng(seed)
    return [
        [generator.integers(10, 60000, generator.integers(1, longest + 1)).tolist() for _ in range(2 * turns)]
        for turns in generator.integers(1, 4, count)
    ]


def write_dataset(directory: Path, shards: list[list[Document]], kind: str = "text", fingerprint: str = "t") -> Path:
    """Write a folder with a manifest and one shard per list of documents."""
    directory.mkdir(parents=True)
    manifests = tuple(_write_shard(directory, number, documents) for number, documents in enumerate(shards))
    save_manifest(directory, DatasetManifest(kind, "uint16", fingerprint, EOS, {}, {}, manifests))
    return directory


def write_pair(prefix: Path, documents: list[Document]) -> None:
    """Write a `.bin`/`.idx` pair alone, as other Megatron tools leave it."""
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=np.uint16)
    for document in documents:
        tokens = torch.tensor([token for segment in document for token in segment])
        builder.add_document(tokens, [len(segment) for segment in document])
    builder.finalize(str(index_path(prefix)))


def _write_shard(directory: Path, number: int, documents: list[Document]) -> ShardManifest:
    name = f"shard_{number:05d}"
    prefix = directory / name
    write_pair(prefix, documents)
    flat = [[token for segment in document for token in segment] for document in documents]
    manifest = ShardManifest(
        name=name,
        documents=len(documents),
        tokens=sum(map(len, flat)),
        scored_tokens=sum(len(segment) for document in documents for segment in document[1::2] or document),
        max_token_id=max(map(max, flat)),
        longest_document=max(map(len, flat)),
        sha256=compute_sha256(bin_path(prefix)),
        index_sha256=compute_sha256(index_path(prefix)),
        input="test",
        first_record=0,
        end_record=len(documents),
    )
    save_shard_manifest(prefix, manifest)
    return manifest
