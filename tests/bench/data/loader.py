"""Measure what the loader sustains, and its share of a step."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from conf.schema import DataConfig, DocumentKind, InputConfig, PrepareConfig, SourceConfig
from data_pipeline.dataset import TokenDataset, build_blend
from data_pipeline.loader import BatchLoader
from data_pipeline.packing.form import SequenceForm
from data_pipeline.prepare.run import prepare_source
from data_pipeline.toy.corpus import load_docstring_chats, load_standard_library, write_jsonl
from data_pipeline.toy.tokenizer import save_tokenizer, train_tokenizer
from pretrain.run.metrics import load_metrics

VOCAB_SIZE = 384
NUM_STEPS = 40
SEQUENCES_PER_STEP = 8
SHAPES = {"text": (4096, 32), "chat": (16384, 32)}  # sequence_length, block_size, as the 3B to 14B recipes have them


def measure_loader() -> dict[str, Any]:
    """Measure how many tokens the loader packs per second, and how long a joint step waits for its batches.

    Returns {loader_tokens_per_second: positions of packed sequences per second on one core, without prefetching, of
    the slower kind; loader_tokens_per_second_by_kind: of texts and of chats;
    loader_share_of_toy_step: seconds that a joint step of the tiny model waits for its batches, of all its seconds,
    without prefetching; loader_share_of_toy_step_prefetched: with}.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        shares = [measure_share(folder, prefetch_steps) for prefetch_steps in (0, 1)]
        rates = {kind: measure_throughput(folder / kind, kind) for kind in SHAPES}
        return {
            "loader_tokens_per_second": min(rates.values()),
            "loader_tokens_per_second_by_kind": rates,
            "loader_share_of_toy_step": shares[0],
            "loader_share_of_toy_step_prefetched": shares[1],
        }


def prepare(folder: Path) -> None:
    """Train a tokenizer; tokenise texts and chats of the standard library into folders named after their kinds."""
    texts, chats = load_standard_library().train, load_docstring_chats().train
    save_tokenizer(train_tokenizer(texts, VOCAB_SIZE), folder / "tokenizer")
    write_jsonl(({"text": text} for text in texts), folder / "text.jsonl")
    write_jsonl(chats, folder / "chat.jsonl")
    settings = PrepareConfig(chat_template="chatml")
    for kind in DocumentKind:
        name = kind.value
        source = SourceConfig(path=str(folder / name), input=InputConfig(kind, files=str(folder / f"{name}.jsonl")))
        prepare_source(name, source, DataConfig(tokenizer=str(folder / "tokenizer"), prepare=settings))


def measure_throughput(path: Path, kind: str) -> float:
    """Return tokens (positions) per second of building batches, median over steps."""
    length, block_size = SHAPES[kind]
    dataset = TokenDataset(path, SequenceForm(length, block_size, block_size), seed=1)
    blend = build_blend({kind: dataset}, {kind: SourceConfig(path=str(path))}, seed=1)
    loader = BatchLoader(blend, SEQUENCES_PER_STEP, SEQUENCES_PER_STEP, 0, 1)
    seconds = []
    for step in range(NUM_STEPS):
        started = time.perf_counter()
        loader.microbatches(step * SEQUENCES_PER_STEP)
        seconds.append(time.perf_counter() - started)
    return SEQUENCES_PER_STEP * length / median(seconds)


def measure_share(folder: Path, prefetch_steps: int) -> float:
    """Return the share of a real joint run of the tiny model that waits for batches, first steps left out."""
    run = folder / f"run_{prefetch_steps}"
    overrides = [
        "stage=joint", "model=tiny", "parallel=single", "precision=fp32", "runtime=cpu", "data.sequence_length=192",
        "runtime.progress_bar=false", "runtime.tensorboard=false", "stage.block_size=16", f"run.dir={run}",
        f"data.train={folder / 'text'}", f"data.tokenizer={folder / 'tokenizer'}", "train.global_batch_size=8",
        "train.micro_batch_size=8", f"train.tokens={NUM_STEPS * 8 * 192}", f"data.prefetch_steps={prefetch_steps}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "pretrain.train", *overrides]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = load_metrics(run, "train")[5:]
    return sum(line["data_seconds"] for line in lines) / sum(line["step_seconds"] for line in lines)
