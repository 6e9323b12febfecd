"""The report of an evaluation: evaluation.json with every number, and the table in the terminal."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from conf.system.atomic import atomic_write_bytes, atomic_write_text
from lora.evaluate.gain import DrafterEvaluation, GroupGain
from lora.evaluate.gain_picture import draw_gain
from model.evaluate.judging import JudgedBatch
from model.evaluate.statistics import AgreementCounts, ModeNumbers
from model.evaluate.tables import FEW_4GRAMS, describe_agreement, mark_loops
from model.evaluate.variants import LINEAR_ADAPTER
from model.hf.options import AR, LINEAR

GAIN_REPORT_FILE, GAIN_PICTURE_FILE = "evaluation.json", "evaluation.png"
TOTALS = ("new_tokens", "num_forwards", "seconds", "tokens_per_forward", "tokens_per_second", "acceptance_length")
TITLES = {AR: "AR", LINEAR: "linear", LINEAR_ADAPTER: "linear + adapter"}
LABEL_WIDTH, GAIN_WIDTH = 17, 20


def save_gain_report(evaluation: DrafterEvaluation, folder: Path, about: dict[str, Any]) -> None:
    """Write both files, each complete or not at all. about: further settings, such as the checkpoint's name."""
    atomic_write_text(folder / GAIN_REPORT_FILE, json.dumps(build_gain_report(evaluation, about), indent=2) + "\n")
    atomic_write_bytes(folder / GAIN_PICTURE_FILE, draw_gain(evaluation))


def build_gain_report(evaluation: DrafterEvaluation, about: dict[str, Any]) -> dict[str, Any]:
    """Return the content of evaluation.json: the numbers of all prompts, then those of every group and prompt."""
    overall = evaluation.overall
    before, after = overall.modes[LINEAR], overall.modes[LINEAR_ADAPTER]
    return {
        "gain_percent": overall.gain_percent,
        "interval": overall.interval,
        "acceptance_length_before": before.acceptance_length,
        "acceptance_length_after": after.acceptance_length,
        "equals_greedy_ar": all(_agreement(numbers).equals_greedy_ar for numbers in (before, after)),
        "settings": about | evaluation.settings,
        "overall": _describe_group(overall),
        "groups": {name: _describe_group(group) for name, group in evaluation.groups.items()},
        "prompts": [_describe_prompt(batch) for batch in evaluation.batches],
    }


def _agreement(numbers: ModeNumbers) -> AgreementCounts:
    assert numbers.agreement is not None, "decoding was greedy"
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
    totals, counts = asdict(numbers), _agreement(numbers)
    return {
        **{name: totals[name] for name in TOTALS},
        "num_equal": counts.equal,
        "num_ties": counts.tie,
        "num_rounded": counts.rounded,
        "num_different": counts.different,
        "equals_greedy_ar": counts.equals_greedy_ar,
    }


def _describe_prompt(batch: JudgedBatch) -> dict[str, Any]:
    """Return counts only: texts are the user's."""
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


def build_gain_table(evaluation: DrafterEvaluation) -> Table:
    """Return a table of 80 columns: three modes per group, and for all prompts if there are several groups."""
    settings = evaluation.settings
    table = Table(
        title="Greedy decoding with and without the draft adapter",
        caption=f"{settings['dtype']} on {settings['device']}, blocks of {settings['block_length']}, up to "
        f"{settings['max_new_tokens']} new tokens. gain: of tokens per forward by the adapter, with its 95% interval. "
        f"4-grams: share of different ones in AR's text; below {FEW_4GRAMS} it loops, which flatters drafts.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        width=80,
    )
    table.add_column("prompts", vertical="bottom", width=LABEL_WIDTH, overflow="fold")
    for title in ("accept\nlength", "tokens/\nforward", "tokens/s", "equals\nAR"):
        table.add_column(title, justify="right", vertical="bottom")
    table.add_column("gain, %", justify="right", vertical="bottom", min_width=GAIN_WIDTH)
    table.add_column("4-grams", justify="right", vertical="bottom")
    for name, group in evaluation.groups.items():
        _add_group(table, name, group)
    if len(evaluation.groups) > 1:
        _add_group(table, "all", evaluation.overall)
    return table


def _add_group(table: Table, name: str, group: GroupGain) -> None:
    table.add_row(Text(f"{name} ({group.numbers.num_prompts})", style="bold"))
    for mode, numbers in group.modes.items():
        table.add_row(
            f" {TITLES[mode]}",
            "-" if numbers.acceptance_length is None else f"{numbers.acceptance_length:.2f}",
            f"{numbers.tokens_per_forward:.2f}",
            f"{numbers.tokens_per_second:.0f}",
            "" if mode == AR else describe_agreement(_agreement(numbers)),
            describe_gain(group) if mode == LINEAR_ADAPTER else "",
            mark_loops(group.distinct_4grams) if mode == AR else "",
        )
    table.add_section()


def describe_gain(group: GroupGain) -> str:
    """Return gain and interval in percent, with a decimal if there is room for it."""
    values = (group.gain_percent, *(group.interval or ()))
    digits = 0 if max(map(abs, values)) >= 100 else 1
    gain, *interval = (f"{value:.{digits}f}" for value in values)
    signed = gain if gain.startswith("-") else f"+{gain}"
    return f"{signed} ({interval[0]}..{interval[1]})" if interval else signed
