"""evaluation.json and evaluation.png."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.atomic import atomic_write_bytes, atomic_write_text
from lora.evaluation.evaluate import Evaluation
from lora.evaluation.plot import draw_evaluation
from lora.evaluation.records import LINEAR, LINEAR_ADAPTER, MODES, SPECULATIVE, DecodedPrompt
from lora.evaluation.statistics import GroupNumbers

REPORT_FILE, PICTURE_FILE = "evaluation.json", "evaluation.png"


def save_evaluation(evaluation: Evaluation, folder: Path, about: dict[str, Any]) -> None:
    """Write both files, each complete or not at all. about: further settings, such as the checkpoint's name."""
    atomic_write_text(folder / REPORT_FILE, json.dumps(describe(evaluation, about), indent=2) + "\n")
    atomic_write_bytes(folder / PICTURE_FILE, draw_evaluation(evaluation))


def describe(evaluation: Evaluation, about: dict[str, Any]) -> dict[str, Any]:
    """The content of evaluation.json: first the numbers of all prompts, then of every group and every prompt."""
    overall = evaluation.overall
    return {
        "gain_percent": overall.gain_percent,
        "interval": overall.interval,
        "acceptance_length_before": overall.modes[LINEAR].acceptance_length,
        "acceptance_length_after": overall.modes[LINEAR_ADAPTER].acceptance_length,
        "equals_greedy_ar": all(overall.modes[mode].equals_greedy_ar for mode in SPECULATIVE),
        "settings": about | evaluation.settings,
        "overall": _describe_group(overall),
        "groups": {name: _describe_group(group) for name, group in evaluation.groups.items()},
        "prompts": [_describe_prompt(decoded) for decoded in evaluation.decoded],
    }


def _describe_group(group: GroupNumbers) -> dict[str, Any]:
    values = asdict(group)
    for mode, numbers in group.modes.items():
        values["modes"][mode]["equals_greedy_ar"] = numbers.equals_greedy_ar
    return values


def _describe_prompt(decoded: DecodedPrompt) -> dict[str, Any]:
    """Counts alone: texts are the user's."""
    modes: dict[str, Any] = {}
    for mode in MODES:
        output = decoded.decoded[mode]
        modes[mode] = {
            "new_tokens": len(output.tokens),
            "num_forwards": output.num_forwards,
            "num_cycles": output.num_cycles,
            "seconds": output.seconds,
        }
        if mode in decoded.agreements:
            modes[mode]["agreement"] = decoded.agreements[mode].value
    prompt = decoded.prompt
    return {
        "place": prompt.place,
        "group": prompt.group,
        "prompt_tokens": len(prompt.token_ids),
        "modes": modes,
    }
