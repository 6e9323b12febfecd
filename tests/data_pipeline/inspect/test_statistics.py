from pathlib import Path

import numpy as np
import pytest

import data_pipeline.inspect.lengths as lengths_module
from data_pipeline.inspect.lengths import count_lengths
from data_pipeline.inspect.statistics import count_tokens, describe_bytes, describe_data, describe_vocabulary
from data_pipeline.storage.tokens import StoredTokens
from tests.helpers.stored import Document, random_chats, random_texts, write_dataset, write_pair


@pytest.mark.parametrize("chunk", [3, 1 << 18])
def test_lengths_are_those_of_numpy_whatever_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(lengths_module, "DOCUMENTS_PER_CHUNK", chunk)
    shards = [random_chats(30, 9, seed=1), random_chats(11, 40, seed=2)]
    found = count_lengths(StoredTokens(write_dataset(tmp_path / "chats", shards, kind="chat")))
    chats = [chat for shard in shards for chat in shard]
    expected = {
        "document": [sum(map(len, chat)) for chat in chats],
        "prompt": [len(segment) for chat in chats for segment in chat[::2]],
        "response": [len(segment) for chat in chats for segment in chat[1::2]],
    }
    for name, values in expected.items():
        assert np.repeat(found[name].lengths, found[name].counts).tolist() == sorted(values)
        assert found[name].mean == pytest.approx(np.mean(values))
        for share in (0, 0.5, 0.95, 1):
            assert found[name].quantile(share) == np.quantile(values, share, method="inverted_cdf")


def flatten(documents: list[Document]) -> list[int]:
    return [token for document in documents for segment in document for token in segment]


@pytest.mark.parametrize("has_manifest", [True, False])
def test_token_counts_include_ids_beyond_the_vocabulary(tmp_path: Path, has_manifest: bool) -> None:
    documents = random_texts(20, 30)
    if has_manifest:
        path = write_dataset(tmp_path / "texts", [documents])
    else:
        path = tmp_path / "pair"
        write_pair(path, documents)
    tokens = np.array(flatten(documents))
    counts = count_tokens(StoredTokens(path), vocab_size=5)
    assert counts[np.unique(tokens)].tolist() == np.unique(tokens, return_counts=True)[1].tolist()
    assert counts.sum() == len(tokens)
    beyond = int((tokens >= 5).sum())
    assert describe_vocabulary(counts, 5) == (
        f"4 of 5 vocabulary entries (80.0%) never occur; {beyond:,} tokens are NOT in the vocabulary"
    )


def test_counts_are_those_of_the_manifest(dataset_dir: Path) -> None:
    stored = StoredTokens(dataset_dir)
    properties = describe_data(stored, None)
    assert stored.manifest
    assert properties["documents"] == f"{stored.manifest.documents:,}" == "40"
    assert properties["tokens"].startswith(f"{stored.manifest.tokens:,} ")
    assert properties["scored tokens"] == f"{stored.manifest.tokens:,} (100.0%)"
    assert properties["shards"] == f"{len(stored.manifest.shards):,}"
    assert "texts.jsonl" in properties["source"] and properties["skipped records"] == "0"


def test_sizes_have_units() -> None:
    assert [describe_bytes(n) for n in (12, 1500, 2.5e9, 2e12)] == ["12 B", "1.5 kB", "2.5 GB", "2 TB"]
