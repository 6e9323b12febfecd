"""Decode held-out prompts with a trained adapter, or without any, and write what every prompt took.

`python -m tests.bench.drafter.measure EXPORT PROMPTS OUTPUT [ADAPTER]` is one process of the benchmark: greedy, in
fp32, by linear and quadratic self-speculation, compared with AR.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from conf.system.atomic import atomic_write_text
from data_pipeline.toy.corpus import write_jsonl
from model.evaluate.evaluation import evaluate_modes
from model.evaluate.options import EvaluationOptions
from model.evaluate.prompts import read_prompts
from model.evaluate.statistics import count_tokens_and_forwards
from model.evaluate.variants import Variant as Mode
from model.export.load import attach_adapter, load_export, load_export_tokenizer
from model.hf.options import AR, LINEAR, QUADRATIC
from tests.bench.drafter.variants import Variant
from tests.bench.medium import GROUPS, BenchModel, load_texts

SPECULATION = (LINEAR, QUADRATIC)
PROMPTS = 24  # per group
PROMPT_CHARACTERS = 2000  # enough for the tokens that are taken
PROMPT_TOKENS, MAX_NEW_TOKENS = 64, 128
WITHOUT = "none"  # the name of what is decoded without an adapter


def write_prompts(model: BenchModel) -> Path:
    """Write one file per group into a folder: beginnings of held-out text at places spread over each document."""
    folder, splits = model.folder / "prompts", load_texts()
    for group in GROUPS:
        heldout = [text for text in splits[group].heldout if len(text) > 2 * PROMPT_CHARACTERS]
        texts = [heldout[number % len(heldout)] for number in range(PROMPTS)]
        starts = [(number * 7919) % (len(text) - PROMPT_CHARACTERS) for number, text in enumerate(texts)]
        records = [{"text": text[start : start + PROMPT_CHARACTERS]} for text, start in zip(texts, starts, strict=True)]
        write_jsonl(records, folder / f"{group}.jsonl")
    return folder


def measure_command(model: BenchModel, prompts: Path, variant: Variant | None) -> list[str]:
    """Return the command that measures one adapter; None: none."""
    adapter = [] if variant is None else [str(variant.adapter(model))]
    output = str(output_path(model, variant))
    return [sys.executable, "-m", "tests.bench.drafter.measure", str(model.export), str(prompts), output, *adapter]


def output_path(model: BenchModel, variant: Variant | None) -> Path:
    """Return the file that measure_command writes."""
    return model.folder / "drafters" / f"{variant.name if variant else WITHOUT}.json"


def is_measured(model: BenchModel, variant: Variant | None) -> bool:
    """Return whether the measurement is there and newer than the model or the adapter."""
    weights = model.export / "config.json" if variant is None else variant.adapter(model) / "adapter_model.safetensors"
    output = output_path(model, variant)
    return output.exists() and output.stat().st_mtime > weights.stat().st_mtime


def measure(export: Path, prompts: Path, adapter: Path | None) -> dict[str, Any]:
    """Decode all prompts. Returns: for every mode new tokens, forwards and cycles of each prompt, and the rest."""
    files = [prompts / f"{group}.jsonl" for group in GROUPS]
    chosen = read_prompts(files, load_export_tokenizer(export), prompt_tokens=PROMPT_TOKENS)
    model: Any = load_export(export, dtype="fp32", device="cpu")
    if adapter is not None:
        attach_adapter(model, adapter)
    modes = [Mode(mode, with_adapter=adapter is not None) for mode in SPECULATION]
    options = EvaluationOptions(max_new_tokens=MAX_NEW_TOKENS, resamples=1)
    evaluation = evaluate_modes(model, chosen, modes, options, stop_ids=())
    counts = {
        mode.mode: {
            "tokens_and_forwards": count_tokens_and_forwards(evaluation.batches, mode.name).tolist(),
            "tokens_and_cycles": [
                (sum(lengths), len(lengths))
                for lengths in (batch.decoded[mode.name].acceptance_lengths for batch in evaluation.batches)
            ],
        }
        for mode in modes
    }
    distinct = evaluation.overall.modes[AR].distinct_4grams
    return {"modes": counts, "num_different": len(evaluation.differences), "distinct_4grams": distinct}


def main() -> None:
    """Measure and write one file."""
    torch.set_num_threads(1)
    export, prompts, output, *adapter = map(Path, sys.argv[1:])
    values = measure(export, prompts, adapter[0] if adapter else None)
    atomic_write_text(output, json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
