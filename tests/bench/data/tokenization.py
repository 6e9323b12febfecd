"""How fast `data_pipeline.prepare` is next to the tokenizers library alone."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from conf.schema import DataConfig, InputConfig, PrepareConfig, SourceConfig
from data_pipeline.prepare.pool import num_cores
from data_pipeline.prepare.run import prepare_source
from data_pipeline.toy.corpus import load_standard_library
from data_pipeline.toy.tokenizer import save_tokenizer, train_tokenizer

VOCAB_SIZE = 16384
NUM_TRIALS, NUM_COPIES = 5, 6  # copies of the standard library's sources (7 MB each)
SHARD_BYTES = 4e6  # so that the last shards keep all cores busy

# The library alone, in a process of its own: texts in memory, one call per copy, as many threads as cores.
RAW = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
size = len(texts) // int(sys.argv[3])
groups = [texts[i : i + size] for i in range(0, len(texts), size)]
begin = time.monotonic()
for group in groups:
    tokenizer.encode_batch(group, add_special_tokens=False)
print(time.monotonic() - begin)
"""


def measure_tokenization() -> dict[str, Any]:
    """Compare the throughput of prepare with that of `Tokenizer.encode_batch`, on as many cores.

    Ours is everything from a .jsonl file to flushed shards with manifests: planning, starting the worker processes,
    reading, parsing, encoding, writing, hashing. The library's is `encode_batch` of texts that are in memory. Both see
    the same texts, in NUM_TRIALS pairs, one after the other in turn: the ratio is the median of the pairs'.

    Returns {tokenize_vs_raw: ours / raw (above 1: ours is faster), megabytes_per_second, raw_megabytes_per_second,
    pair_ratios, cores, megabytes}.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, tokenizer_dir = write_corpus(folder, NUM_COPIES)
        megabytes = corpus.stat().st_size / 1e6
        trials = []
        for number in range(NUM_TRIALS):
            ours = _time_ours(corpus, tokenizer_dir, folder / f"tokens_{number}")
            trials.append((ours, _time_raw(corpus, tokenizer_dir)))
    ours, raw = (median(seconds) for seconds in zip(*trials, strict=True))
    return {
        "tokenize_vs_raw": median(raw / ours for ours, raw in trials),
        "megabytes_per_second": megabytes / ours,
        "raw_megabytes_per_second": megabytes / raw,
        "pair_ratios": [raw / ours for ours, raw in trials],
        "cores": num_cores(),
        "megabytes": megabytes,
    }


def write_corpus(folder: Path, num_copies: int) -> tuple[Path, Path]:
    """Write the standard library's sources `num_copies` times as .jsonl; train a tokenizer on them if there is none."""
    texts = load_standard_library().train
    tokenizer_dir = folder / "tokenizer"
    if not tokenizer_dir.exists():
        save_tokenizer(train_tokenizer(texts, VOCAB_SIZE), tokenizer_dir)
    corpus = folder / f"corpus_{num_copies}.jsonl"
    with open(corpus, "w", encoding="utf-8") as file:
        for _ in range(num_copies):
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return corpus, tokenizer_dir


def _time_ours(corpus: Path, tokenizer_dir: Path, output: Path) -> float:
    source = SourceConfig(path=str(output), input=InputConfig(files=str(corpus)))
    data = DataConfig(tokenizer=str(tokenizer_dir), prepare=PrepareConfig(shard_bytes=SHARD_BYTES))
    begin = time.monotonic()
    prepare_source("benchmark", source, data)
    return time.monotonic() - begin


def _time_raw(corpus: Path, tokenizer_dir: Path) -> float:
    threads = {"RAYON_NUM_THREADS": str(num_cores()), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-c", RAW, str(tokenizer_dir / "tokenizer.json"), str(corpus), str(NUM_COPIES)]
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=True)
    return float(done.stdout)


if __name__ == "__main__":
    print(json.dumps(measure_tokenization(), indent=2))
