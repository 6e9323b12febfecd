"""Measure what each trained adapter gains on the same held-out prompts, through `python -m lora.evaluate`."""

import json
import sys
from pathlib import Path
from typing import Any

from data_pipeline.toy.corpus import write_jsonl
from lora.evaluate.gain_report import GAIN_REPORT_FILE
from pretrain.run.metrics import load_metrics
from tests.bench.drafter.variants import Variant
from tests.bench.medium import EXPORT, GROUPS, ROOT, load_texts

PROMPTS = 64  # per group
SHORT_PROMPTS = 12  # per group, where many adapters are compared
PROMPT_CHARACTERS = 2000  # enough for the tokens that --prompt-tokens takes
MAX_NEW_TOKENS = 128


def write_prompts() -> list[Path]:
    """Write one file per group: beginnings of held-out text at places spread over each document."""
    files, splits = [], load_texts()
    for group in GROUPS:
        heldout = [text for text in splits[group].heldout if len(text) > 2 * PROMPT_CHARACTERS]
        texts = [heldout[number % len(heldout)] for number in range(PROMPTS)]
        starts = [(number * 7919) % (len(text) - PROMPT_CHARACTERS) for number, text in enumerate(texts)]
        records = [{"text": text[start : start + PROMPT_CHARACTERS]} for text, start in zip(texts, starts, strict=True)]
        files.append(ROOT / "prompts" / f"{group}.jsonl")
        write_jsonl(records, files[-1])
    return files


def evaluate_command(variant: Variant, prompts: list[Path], limit: int) -> list[str]:
    """Return the command that evaluates one adapter in fp32."""
    return [
        *(sys.executable, "-m", "lora.evaluate", str(EXPORT), "--adapter", str(variant.adapter)),
        *("--prompts", *map(str, prompts), "--limit", str(limit), "--max-new-tokens", str(MAX_NEW_TOKENS)),
        *("--output", str(_output(variant)), "--device", "cpu", "--dtype", "fp32"),
    ]


def read_result(variant: Variant) -> dict[str, Any]:
    """Read the gain on the prompts, and acceptance on held-out blocks of text before and after training."""
    report = json.loads((_output(variant) / GAIN_REPORT_FILE).read_text(encoding="utf-8"))
    keys = ("gain_percent", "interval", "acceptance_length_before", "acceptance_length_after", "equals_greedy_ar")
    heldout = load_metrics(variant.run_dir, "heldout")
    return {
        **{key: report[key] for key in keys},
        "tokens_per_forward": {
            mode: values["tokens_per_forward"] for mode, values in report["overall"]["modes"].items()
        },
        "distinct_4grams": report["overall"].get("distinct_4grams"),
        "groups": {name: group["gain_percent"] for name, group in report["groups"].items()},
        "num_prompts": len(report["prompts"]),
        "heldout_acceptance_length": [heldout[0]["acceptance_length"], heldout[-1]["acceptance_length"]],
        "steps": heldout[-1]["step"],
    }


def is_measured(variant: Variant) -> bool:
    """Return whether the variant's report is newer than its adapter."""
    report, weights = _output(variant) / GAIN_REPORT_FILE, variant.adapter / "adapter_model.safetensors"
    return report.exists() and report.stat().st_mtime > weights.stat().st_mtime


def _output(variant: Variant) -> Path:
    return variant.run_dir / "evaluation"
