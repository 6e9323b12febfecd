"""Writes the report of an evaluation: modes.json and the pictures."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.system.atomic import atomic_write_bytes, atomic_write_text
from model.evaluate.ceiling import Ceiling
from model.evaluate.choice_scoring import ChoiceScores
from model.evaluate.choices import Choices
from model.evaluate.evaluation import Evaluation
from model.evaluate.judging import JudgedBatch
from model.evaluate.pictures import draw_acceptance, draw_modes, draw_thresholds
from model.evaluate.statistics import ChoiceNumbers, GroupNumbers

REPORT_FILE = "modes.json"
# Names in code -> keys of modes.json, which keep their first spelling for those who read them.
REPORT_KEYS = {"num_positions": "num_rows", "tokens_per_position": "tokens_per_row"}
MODES_PICTURE, ACCEPTANCE_PICTURE, THRESHOLDS_PICTURE = "modes.png", "acceptance_length.png", "thresholds.png"


def save_modes_report(evaluation: Evaluation, folder: Path, about: dict[str, Any]) -> None:
    """Write the report and the pictures that there are numbers for, each complete or not at all.

    An earlier evaluation's picture that this one does not draw is removed. about: see describe_evaluation.
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
    atomic_write_text(folder / REPORT_FILE, json.dumps(describe_evaluation(evaluation, about), indent=2) + "\n")


def _describe_run(evaluation: Evaluation, about: dict[str, Any]) -> str:
    """Summarize in one line what was measured."""
    settings = evaluation.settings
    num_prompts = sum(len(batch.prompts) for batch in evaluation.batches)
    parts = [Path(str(about.get("checkpoint", ""))).name, f"{num_prompts} prompts"]
    parts += [f"{settings['dtype']} on {settings['device']}", f"batches of {settings['batch_size']}"]
    parts += [f"blocks of {settings['block_length']}", f"at most {settings['max_new_tokens']} new tokens"]
    return ", ".join(part for part in parts if part)


def describe_evaluation(evaluation: Evaluation, about: dict[str, Any]) -> dict[str, Any]:
    """Return the content of modes.json. about: further settings, such as the checkpoint's name.

    `overall` and `groups` hold numbers by variant (`linear+adapter@0.9`), `prompts` the counts of each prompt.
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
        "overall": _describe_group(overall, None, evaluation.summarize_choices()),
        "groups": {
            name: _describe_group(group, evaluation.add_ceilings(name), evaluation.summarize_choices(name))
            for name, group in evaluation.groups.items()
        },
        "prompts": [prompt for batch in evaluation.batches for prompt in _describe_batch(batch, evaluation)],
    }


def rename_report_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values under the keys of modes.json."""
    return {REPORT_KEYS.get(key, key): value for key, value in values.items()}


def describe_ceiling(ceiling: Ceiling | None) -> dict[str, Any] | None:
    """Return the counts and both ratios."""
    if ceiling is None:
        return None
    return {
        "tokens_per_forward": ceiling.tokens_per_forward,
        "tokens_per_forward_without_commits": ceiling.tokens_per_forward_without_commits,
        "num_forwards": ceiling.num_forwards,
        **asdict(ceiling),
    }


def _describe_group(group: GroupNumbers, ceiling: Ceiling | None, choices: dict[str, ChoiceNumbers]) -> dict[str, Any]:
    values = asdict(group)
    values["modes"] = {name: rename_report_keys(numbers) for name, numbers in values["modes"].items()}
    if ceiling is not None:
        values["speed_of_light"] = describe_ceiling(ceiling)
    if choices:
        values["choices"] = {way: asdict(numbers) for way, numbers in choices.items()}
    for name, numbers in group.modes.items():
        if numbers.agreement is not None:
            values["modes"][name]["agreement"] |= {
                "rate": numbers.agreement.rate,
                "equals_greedy_ar": numbers.agreement.equals_greedy_ar,
            }
    return values


def _describe_batch(batch: JudgedBatch, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Describe every prompt of a batch; what belongs to the batch as a whole is repeated for each."""
    prompts = []
    for index, prompt in enumerate(batch.prompts):
        modes = {name: _describe_response(batch, name, index) for name in batch.decoded}
        values = {
            "place": prompt.place,
            "group": prompt.group,
            "prompt_tokens": len(prompt.token_ids),
            "answers": prompt.answers,
            "batch_size": len(batch.prompts),
            "modes": modes,
        }
        if prompt.place in evaluation.ceilings:
            values["speed_of_light"] = describe_ceiling(evaluation.ceilings[prompt.place])
        if prompt.choices is not None:
            values["choices"] = _describe_choices(prompt.choices, evaluation.choices[prompt.place])
        prompts.append(values)
    return prompts


def _describe_choices(choices: Choices, scores: dict[str, ChoiceScores]) -> dict[str, Any]:
    """Return the texts and what each way of scoring makes of them."""
    ways = {
        way: {**asdict(one), "chosen": one.chosen, "correct": choices.correct[one.chosen]}
        for way, one in scores.items()
    }
    return {"texts": choices.texts, **ways}


def _describe_response(batch: JudgedBatch, name: str, index: int) -> dict[str, Any]:
    decoded = batch.decoded[name]
    values: dict[str, Any] = {
        "new_tokens": len(decoded.tokens[index]),
        "num_forwards": decoded.num_forwards,
        "forwards": decoded.forwards,
        "num_rows": decoded.num_positions,
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
