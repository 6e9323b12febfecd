"""The table in the terminal; it fits 80 columns."""

from rich import box
from rich.table import Table
from rich.text import Text

from lora.evaluate.report import agreement_of
from lora.evaluate.run import DrafterEvaluation
from lora.evaluate.statistics import GroupGain
from model.commands.modes import LINEAR_ADAPTER
from model.evaluate.tables import FEW_4GRAMS, describe_agreement, mark_loops
from model.hf.options import AR, LINEAR

TITLES = {AR: "AR", LINEAR: "linear", LINEAR_ADAPTER: "linear + adapter"}
LABEL_WIDTH, GAIN_WIDTH = 17, 20


def build_table(evaluation: DrafterEvaluation) -> Table:
    """Three modes per group, and of all prompts where there are several groups."""
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
            "" if mode == AR else describe_agreement(agreement_of(numbers)),
            describe_gain(group) if mode == LINEAR_ADAPTER else "",
            mark_loops(group.distinct_4grams) if mode == AR else "",
        )
    table.add_section()


def describe_gain(group: GroupGain) -> str:
    """Gain and interval in percent, with a decimal where there is room for it."""
    values = (group.gain_percent, *(group.interval or ()))
    digits = 0 if max(map(abs, values)) >= 100 else 1
    gain, *interval = (f"{value:.{digits}f}" for value in values)
    signed = gain if gain.startswith("-") else f"+{gain}"
    return f"{signed} ({interval[0]}..{interval[1]})" if interval else signed
