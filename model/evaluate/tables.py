"""The tables that an evaluation prints; they fit 80 columns."""

from collections.abc import Iterable

from rich import box
from rich.table import Table
from rich.text import Text

from model.evaluate.choice_scoring import AR_LIKELIHOOD, MASKED
from model.evaluate.evaluation import Evaluation
from model.evaluate.statistics import Accuracy, AgreementCounts, ChoiceNumbers, ModeNumbers, Percentiles
from model.evaluate.variants import Variant
from model.hf.options import AR

FEW_4GRAMS = 0.5  # below this share half of the text repeats itself
WIDTH = 80
NO_BREAK = "\u00a0"
WAY_TITLES = {AR_LIKELIHOOD: "AR likelihood", MASKED: "masks"}
NARROW_TITLES = {"leading": "lead-\ning", "accuracy": "accu-\nracy", "4-grams": "4-\ngrams"}


def build_tables(evaluation: Evaluation) -> list[Table]:
    """Build the tables: speed, forwards, text; choices, groups and thresholds where there are any."""
    tables = [_build_speed(evaluation), _build_forwards(evaluation), _build_text(evaluation)]
    if choices := evaluation.summarize_choices():
        tables.append(_build_choices(choices))
    if len(evaluation.groups) > 1:
        tables.append(_build_groups(evaluation))
    if evaluation.swept_variants:
        tables.append(_build_thresholds(evaluation))
    return tables


def _build_speed(evaluation: Evaluation) -> Table:
    settings = evaluation.settings
    sampling = "greedy" if settings["temperature"] == 0 else f"temperature {settings['temperature']:g}"
    table = make_table(
        "Speed",
        f"{evaluation.overall.num_prompts} prompts, {settings['batch_size']} at a time, {sampling}, "
        f"{settings['dtype']} on {settings['device']}, blocks of {settings['block_length']}, up to "
        f"{settings['max_new_tokens']} new tokens. tokens/position: per token position that the layers computed. "
        "In brackets: 95% interval. P50, P95: half and 95% of the responses are faster; per token: a response's "
        "seconds by its tokens.",
    )
    _add_columns(table, ("tokens/\nforward", "tokens/\nposition", "tok/s", "ms/token\nP50 P95", "s/response\nP50 P95"))
    for name, numbers in _plain_numbers(evaluation).items():
        table.add_row(
            name,
            describe_rate(numbers),
            f"{numbers.tokens_per_position:.3f}",
            f"{numbers.tokens_per_second:.0f}",
            _describe_percentiles(numbers.token_seconds, 1000),
            _describe_percentiles(numbers.response_seconds, 1),
        )
    if ceiling := evaluation.add_ceilings():
        table.add_section()
        table.add_row("speed of light", f"{ceiling.tokens_per_forward:.2f}")
        table.add_row(" without commits", f"{ceiling.tokens_per_forward_without_commits:.2f}")
    return table


def _build_forwards(evaluation: Evaluation) -> Table:
    """Build the table of forwards by kind and of how many proposals were committed."""
    modes = _plain_numbers(evaluation)
    table = make_table(
        "Forwards",
        "commit ratio: share of the proposed tokens that were committed. accept length: tokens per cycle of draft and "
        "verification, the verifier's own included.",
    )
    _add_columns(table, ("forwards by kind", "commit\nratio", "accept\nlength"))
    for name, numbers in modes.items():
        table.add_row(
            name,
            ", ".join(f"{kind}{NO_BREAK}{count}" for kind, count in numbers.forwards.items()),
            _describe_optional(numbers.commit_ratio, ".1%"),
            _describe_optional(numbers.acceptance_length, ".2f"),
        )
    return table


def _build_text(evaluation: Evaluation) -> Table:
    """Build the table that compares text with greedy AR and with the answers, and shows loops."""
    modes = _plain_numbers(evaluation)
    titles = _text_titles(modes.values())
    captions = {
        "equals\nAR": "equals AR: responses that are greedy AR's.",
        "leading": "leading: share of AR's tokens before the first difference.",
        "accuracy": "accuracy: exact match, with its 95% interval.",
        "4-grams": f"4-grams: share of distinct ones; below {FEW_4GRAMS} the text loops, which flatters drafts.",
    }
    table = make_table("Text", " ".join(captions[title] for title in titles))
    _add_columns(table, titles)
    for name, numbers in modes.items():
        cells = _describe_text(evaluation.variants[name], numbers, describe_accuracy(numbers.accuracy))
        table.add_row(name, *(cells.get(title, "-") for title in titles))
    return table


def _build_choices(choices: dict[str, ChoiceNumbers]) -> Table:
    """Build the table of the ways to score choices."""
    guessing = next(iter(choices.values())).guessing
    table = make_table(
        "Multiple choice",
        f"accuracy: questions whose best choice is right, with its 95% interval; guessing: {guessing:.0%}. Both ways "
        "add the log-probabilities of a choice's tokens, AR each after those before it, the other all at once, each "
        "at its own mask. forwards, positions: per question.",
    )
    _add_columns(table, ("accuracy", "forwards", "positions"), first="scored by")
    for way, numbers in choices.items():
        counts = (numbers.num_forwards, numbers.num_positions)
        means = (f"{count / numbers.accuracy.num_scored:.1f}" for count in counts)
        table.add_row(WAY_TITLES[way], describe_accuracy(numbers.accuracy), *means)
    return table


def _text_titles(modes: Iterable[ModeNumbers]) -> list[str]:
    """Return the columns for which there are numbers."""
    titles = []
    if any(numbers.agreement for numbers in modes):
        titles += ["equals\nAR", "leading"]
    if any(numbers.accuracy for numbers in modes):
        titles.append("accuracy")
    return [*titles, "4-grams"]


def _build_thresholds(evaluation: Evaluation) -> Table:
    """Build the table of speed and text of every variant at every threshold."""
    swept = {variant.name: evaluation.overall.modes[variant.name] for variant in evaluation.swept_variants}
    titles = _text_titles(swept.values())
    intervals = " Intervals of the accuracy are in modes.json." if "accuracy" in titles else ""
    table = make_table(
        "Thresholds",
        f"block_diffusion commits at this probability; speculative drafts end before a less probable token.{intervals}",
    )
    narrow = [NARROW_TITLES.get(title, title) for title in titles]
    _add_columns(table, ("tokens/\nforward", "tokens/\nposition", "tok/s", *narrow))
    for name, numbers in swept.items():
        rates = (f"{numbers.tokens_per_forward:.2f}", f"{numbers.tokens_per_position:.3f}")
        share = "-" if numbers.accuracy is None else f"{numbers.accuracy.share:.0%}"
        cells = _describe_text(evaluation.variants[name], numbers, share)
        table.add_row(name, *rates, f"{numbers.tokens_per_second:.0f}", *(cells.get(title, "-") for title in titles))
    return table


def _build_groups(evaluation: Evaluation) -> Table:
    """Build the table with one column per group; long names wrap."""
    table = make_table("Tokens per forward by group", "")
    names = list(evaluation.groups)
    _add_columns(table, names)
    for name in _plain_numbers(evaluation):
        rates = [evaluation.groups[group].modes[name].tokens_per_forward for group in names]
        table.add_row(name, *(f"{rate:.2f}" for rate in rates))
    if evaluation.ceilings:
        ceilings = [evaluation.add_ceilings(group) for group in names]
        table.add_row("speed of light", *(f"{c.tokens_per_forward:.2f}" for c in ceilings if c))
    return table


def _plain_numbers(evaluation: Evaluation) -> dict[str, ModeNumbers]:
    return {variant.name: evaluation.overall.modes[variant.name] for variant in evaluation.plain_variants}


def make_table(title: str, caption: str) -> Table:
    """Return an empty table in the common look."""
    return Table(
        title=title,
        caption=f"{caption}\n",  # a blank line before the next table
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        width=WIDTH,
    )


def _add_columns(table: Table, titles: Iterable[str], first: str = "mode") -> None:
    table.add_column(first, vertical="bottom", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", vertical="bottom", overflow="fold")


def describe_rate(numbers: ModeNumbers) -> str:
    """Format tokens per forward with their interval."""
    interval = numbers.tokens_per_forward_interval
    bounds = "" if interval is None or interval[0] == interval[1] else f" ({interval[0]:.2f}..{interval[1]:.2f})"
    return f"{numbers.tokens_per_forward:.2f}{bounds}"


def describe_accuracy(accuracy: Accuracy | None) -> str:
    """Format the share of correct responses with its interval."""
    if accuracy is None:
        return "-"
    low, high = accuracy.interval
    return f"{accuracy.share:.0%} ({low:.0%}..{high:.0%}) of {accuracy.num_scored}"


def describe_agreement(counts: AgreementCounts) -> Text:
    """Say whether a lossless mode gave AR's text.

    The cell is `yes`, the number of ties, the share of equal responses where the dtype promises nothing, or how many
    responses differ.
    """
    if counts.different:
        return Text(f"NO: {counts.different}", style="bold red")
    if counts.rounded:
        return Text(f"{counts.rate:.0%}")
    if counts.tie:
        return Text(f"{counts.tie} tie{'s' if counts.tie > 1 else ''}")
    return Text("yes")


def _describe_text(variant: Variant, numbers: ModeNumbers, accuracy: str) -> dict[str, Text | str]:
    """Return the cells of a text table by their titles."""
    counts = numbers.agreement
    cells: dict[str, Text | str] = {
        "accuracy": accuracy,
        "4-grams": mark_loops(numbers.distinct_4grams),
    }
    if counts is not None and variant.mode != AR:
        cells["equals\nAR"] = describe_agreement(counts) if variant.is_lossless else f"{counts.rate:.0%}"
        cells["leading"] = f"{counts.leading_share:.0%}"
    return cells


def mark_loops(distinct: float) -> Text:
    """Format the share of distinct 4-grams, coloured if it is low."""
    return Text(f"{distinct:.2f}", style="yellow" if distinct < FEW_4GRAMS else "")


def _describe_percentiles(values: Percentiles, scale: float) -> str:
    return " ".join(_round(value * scale) for value in (values.p50, values.p95))


def _round(value: float) -> str:
    """Format a positive number with about three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _describe_optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
