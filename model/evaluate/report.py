"""modes.json and the pictures."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.system.atomic import atomic_write_bytes, atomic_write_text
from model.evaluate.ceiling import Ceiling
from model.evaluate.plot import draw_acceptance, draw_modes, draw_thresholds
from model.evaluate.records import DecodedBatch
from model.evaluate.run import Evaluation
from model.evaluate.statistics import GroupNumbers

REPORT_FILE = "modes.json"
MODES_PICTURE, ACCEPTANCE_PICTURE, THRESHOLDS_PICTURE = "modes.png", "acceptance_length.png", "thresholds.png"


def save_evaluation(evaluation: Evaluation, folder: Path, about: dict[str, Any]) -> None:
    """Write the report and those pictures there are numbers for, each complete or not at all.

    A picture of an earlier evaluation that has no counterpart is removed. about: see describe.
    """
    note = _describe_run(evaluation, about)
    pictures = {
        MODES_PICTURE: draw_modes(evaluation, note),
        ACCEPTANCE_PICTURE: draw_acceptance(evaluation, note),
        THRESHOLDS_PICTURE: draw_thresholds(evaluation, note),
    }
    for name, picture in pictures.items():
        if picture is None:
            (folder / name).unlink(missing_ok=True)
        else:
            atomic_write_bytes(folder / name, picture)
    atomic_write_text(folder / REPORT_FILE, json.dumps(describe(evaluation, about), indent=2) + "\n")


def _describe_run(evaluation: Evaluation, about: dict[str, Any]) -> str:
    """What was measured, in one line."""
    settings = evaluation.settings
    num_prompts = sum(len(batch.prompts) for batch in evaluation.batches)
    parts = [Path(str(about.get("checkpoint", ""))).name, f"{num_prompts} prompts"]
    parts += [f"{settings['dtype']} on {settings['device']}", f"batches of {settings['batch_size']}"]
    parts += [f"blocks of {settings['block_length']}", f"at most {settings['max_new_tokens']} new tokens"]
    return ", ".join(part for part in parts if part)


def describe(evaluation: Evaluation, about: dict[str, Any]) -> dict[str, Any]:
    """The content of modes.json. about: further settings, such as the checkpoint's name.

    overall and groups: numbers by variant (`linear`, `linear+adapter`, `linear+adapter@0.9`); prompts: counts of each.
    """
    overall = evaluation.overall
    lossless = [name for name, variant in evaluation.variants.items() if variant.is_lossless]
    judged = [numbers for name in lossless if (numbers := overall.modes[name].agreement) is not None]
    return {
        "tokens_per_forward": {name: numbers.tokens_per_forward for name, numbers in overall.modes.items()},
        "speed_of_light": describe_ceiling(evaluation.add_ceilings()),
        "equals_greedy_ar": all(counts.equals_greedy_ar for counts in judged) if judged else None,
        "settings": about | evaluation.settings,
        "variants": {name: asdict(variant) for name, variant in evaluation.variants.items()},
        "overall": _describe_group(overall, None),
        "groups": {
            name: _describe_group(group, evaluation.add_ceilings(name)) for name, group in evaluation.groups.items()
        },
        "prompts": [row for batch in evaluation.batches for row in _describe_batch(batch, evaluation.ceilings)],
    }


def describe_ceiling(ceiling: Ceiling | None) -> dict[str, Any] | None:
    """Counts and both ratios."""
    if ceiling is None:
        return None
    return {
        "tokens_per_forward": ceiling.tokens_per_forward,
        "tokens_per_forward_without_commits": ceiling.tokens_per_forward_without_commits,
        "num_forwards": ceiling.num_forwards,
        **asdict(ceiling),
    }


def _describe_group(group: GroupNumbers, ceiling: Ceiling | None) -> dict[str, Any]:
    values = asdict(group)
    if ceiling is not None:
        values["speed_of_light"] = describe_ceiling(ceiling)
    for name, numbers in group.modes.items():
        if numbers.agreement is not None:
            values["modes"][name]["agreement"] |= {
                "rate": numbers.agreement.rate,
                "equals_greedy_ar": numbers.agreement.equals_greedy_ar,
            }
    return values


def _describe_batch(batch: DecodedBatch, ceilings: dict[str, Ceiling]) -> list[dict[str, Any]]:
    """Of every prompt; texts (the user's) only if they were kept. What is the batch's own is said of each."""
    rows = []
    for index, prompt in enumerate(batch.prompts):
        modes = {name: _describe_response(batch, name, index) for name in batch.decoded}
        row = {
            "place": prompt.place,
            "group": prompt.group,
            "prompt_tokens": len(prompt.token_ids),
            "answers": prompt.answers,
            "batch_size": len(batch.prompts),
            "modes": modes,
        }
        if prompt.place in ceilings:
            row["speed_of_light"] = describe_ceiling(ceilings[prompt.place])
        rows.append(row)
    return rows


def _describe_response(batch: DecodedBatch, name: str, index: int) -> dict[str, Any]:
    decoded = batch.decoded[name]
    values: dict[str, Any] = {
        "new_tokens": len(decoded.tokens[index]),
        "num_forwards": decoded.num_forwards,
        "forwards": decoded.forwards,
        "num_rows": decoded.num_rows,
        "num_cycles": len(decoded.acceptance_lengths),
        "seconds": decoded.seconds,
    }
    if name in batch.agreements:
        values["agreement"] = batch.agreements[name][index].value
    if name in batch.correct:
        values["correct"] = batch.correct[name][index]
    if name in batch.texts:
        values["text"] = batch.texts[name][index]
    return values
