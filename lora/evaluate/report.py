"""evaluation.json and evaluation.png."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.system.atomic import atomic_write_bytes, atomic_write_text
from lora.evaluate.plot import draw_evaluation
from lora.evaluate.run import DrafterEvaluation
from lora.evaluate.statistics import GroupGain
from model.commands.modes import LINEAR_ADAPTER
from model.evaluate.judging import JudgedBatch
from model.evaluate.statistics import AgreementCounts, ModeNumbers
from model.hf.options import AR, LINEAR

REPORT_FILE, PICTURE_FILE = "evaluation.json", "evaluation.png"
TOTALS = ("new_tokens", "num_forwards", "seconds", "tokens_per_forward", "tokens_per_second", "acceptance_length")


def save_evaluation(evaluation: DrafterEvaluation, folder: Path, about: dict[str, Any]) -> None:
    """Write both files, each complete or not at all. about: further settings, such as the checkpoint's name."""
    atomic_write_text(folder / REPORT_FILE, json.dumps(describe(evaluation, about), indent=2) + "\n")
    atomic_write_bytes(folder / PICTURE_FILE, draw_evaluation(evaluation))


def describe(evaluation: DrafterEvaluation, about: dict[str, Any]) -> dict[str, Any]:
    """The content of evaluation.json: first the numbers of all prompts, then of every group and every prompt."""
    overall = evaluation.overall
    before, after = overall.modes[LINEAR], overall.modes[LINEAR_ADAPTER]
    return {
        "gain_percent": overall.gain_percent,
        "interval": overall.interval,
        "acceptance_length_before": before.acceptance_length,
        "acceptance_length_after": after.acceptance_length,
        "equals_greedy_ar": all(agreement_of(numbers).equals_greedy_ar for numbers in (before, after)),
        "settings": about | evaluation.settings,
        "overall": _describe_group(overall),
        "groups": {name: _describe_group(group) for name, group in evaluation.groups.items()},
        "prompts": [_describe_prompt(batch) for batch in evaluation.batches],
    }


def agreement_of(numbers: ModeNumbers) -> AgreementCounts:
    """Of a drafter's evaluation, which is greedy."""
    assert numbers.agreement is not None
    return numbers.agreement


def _describe_group(group: GroupGain) -> dict[str, Any]:
    return {
        "num_prompts": group.numbers.num_prompts,
        "modes": {name: _describe_mode(numbers) for name, numbers in group.modes.items()},
        "gain_percent": group.gain_percent,
        "interval": group.interval,
        "distinct_4grams": group.distinct_4grams,
    }


def _describe_mode(numbers: ModeNumbers) -> dict[str, Any]:
    totals, counts = asdict(numbers), agreement_of(numbers)
    return {
        **{name: totals[name] for name in TOTALS},
        "num_equal": counts.equal,
        "num_ties": counts.tie,
        "num_rounded": counts.rounded,
        "num_different": counts.different,
        "equals_greedy_ar": counts.equals_greedy_ar,
    }


def _describe_prompt(batch: JudgedBatch) -> dict[str, Any]:
    """Counts alone: texts are the user's."""
    modes: dict[str, Any] = {}
    for name, output in batch.decoded.items():
        modes[name] = {
            "new_tokens": len(output.tokens[0]),
            "num_forwards": output.num_forwards,
            "num_cycles": len(output.acceptance_lengths),
            "seconds": output.seconds,
        }
        if name != AR:
            modes[name]["agreement"] = batch.agreements[name][0].value
    prompt = batch.prompts[0]
    return {
        "place": prompt.place,
        "group": prompt.group,
        "prompt_tokens": len(prompt.token_ids),
        "modes": modes,
    }
