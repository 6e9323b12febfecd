"""Memory does not grow with the corpus: no process may have as much as the corpus is large."""

from pathlib import Path

import pytest

from data_pipeline.storage.manifest import load_manifest
from tests.bench.data.memory import measure_peak
from tests.bench.data.tokenization import write_corpus

LIMIT_BYTES = 100_000_000


def test_a_corpus_larger_than_the_memory_is_read(tmp_path: Path, tokenizer_dir: Path) -> None:
    text = "some words of a document " * 40
    corpus = tmp_path / "corpus.jsonl"
    with open(corpus, "w", encoding="utf-8") as file:
        file.writelines(f'{{"text": "{number} {text}"}}\n' for number in range(LIMIT_BYTES // len(text)))
    peak = measure_peak(corpus, tokenizer_dir, tmp_path / "out", LIMIT_BYTES, records="heldout", heldout_every=1000)
    assert peak < LIMIT_BYTES < corpus.stat().st_size
    assert 50 < load_manifest(tmp_path / "out").documents < 200


@pytest.mark.slow
def test_a_corpus_larger_than_the_memory_is_tokenised(tmp_path: Path) -> None:
    corpus, tokenizer_dir = write_corpus(tmp_path, num_copies=15)
    peak = measure_peak(corpus, tokenizer_dir, tmp_path / "out", LIMIT_BYTES)
    assert peak < LIMIT_BYTES < corpus.stat().st_size
