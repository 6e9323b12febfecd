"""Print the summary: the table of decoding modes, a line per stage, the checks, and where everything is."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.quickstart.folder import QuickstartFolder

MODE_TITLES = {
    "ar": "AR",
    "block_diffusion": "block diffusion",
    "linear": "linear speculation",
    "quadratic": "quadratic speculation",
    "linear+adapter": "linear + adapter",
}
# Field of ModeMeasurement, its name in the table, digits after the point.
MEASUREMENTS = (
    ("new_tokens", "new tokens", 0),
    ("num_forwards", "forwards", 0),
    ("tokens_per_forward", "tokens per forward", 2),
    ("acceptance_length", "acceptance length", 2),
    ("real_context_acceptance", "real-context acceptance", 2),
    ("tokens_per_second", "tokens/s", 0),
    ("equals_greedy_ar", "equals greedy AR", 0),
    ("distinct_4grams", "distinct 4-grams", 2),
)


def print_summary(console: Console, summary: dict[str, Any], folder: QuickstartFolder) -> None:
    """Print everything a user wants to see at the end."""
    console.print()
    console.print(build_mode_table(summary))
    for name, stage in summary["stages"].items():
        console.print(describe_stage(name, stage), soft_wrap=True)
    console.print(describe_drafter(summary["drafter"]), soft_wrap=True)
    console.print(f"unigram entropy of the held-out text: {summary['unigram_entropy']:.3f} nats per token")
    for response in summary["responses"]:
        console.print(Text.assemble(("question: ", "dim"), response["prompt"]), soft_wrap=True)
        how = f"{MODE_TITLES[response['mode']]}, {response['tokens_per_forward']:.2f} tokens per forward"
        console.print(Text.assemble((f"response ({how}): ", "dim"), response["text"]), soft_wrap=True)
    for check in summary["checks"]:
        mark = Text("ok  " if check["passed"] else "FAIL", style="green" if check["passed"] else "bold red")
        console.print(mark, f"{check['name']}: {check['value']} (wanted: {check['wanted']})", soft_wrap=True)
    phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary["seconds"].items())
    console.print(f"seconds: {phases}", soft_wrap=True)
    for what, path in (
        ("export", folder.export),
        ("adapter", folder.adapter),
        ("instruct", folder.instruct),
        ("curves", folder.curves),
        ("summary", folder.summary),
    ):
        console.print(f"{what}: {path}", soft_wrap=True)


def build_mode_table(summary: dict[str, Any]) -> Table:
    """Build a table with a column per mode, 80 characters wide at most; a dash means that a number does not apply."""
    decoding = summary["decoding"]
    table = Table(
        title=f"Greedy decoding of {decoding['num_prompts']} held-out prompts",
        caption=f"{decoding['dtype']}, blocks of {decoding['block_length']}; real contexts: one cycle from each of "
        f"{decoding['num_contexts']} true prefixes;\nlinear, quadratic: self-speculation",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for mode in summary["modes"]:
        table.add_column(MODE_TITLES[mode].removesuffix(" speculation").replace(" ", "\n", 1), justify="right")
    for name, title, digits in MEASUREMENTS:
        table.add_row(title, *(_cell(values[name], digits) for values in summary["modes"].values()))
    return table


def _cell(value: float | bool | None, digits: int) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.{digits}f}"


def describe_stage(name: str, stage: dict[str, Any]) -> str:
    """Describe a training stage in one line."""
    layout = stage["layout"]
    degrees = (("TP", "tensor_parallel"), ("PP", "pipeline_parallel"), ("DP", "data_parallel"))
    short = " ".join(f"{letters}{layout[key]}" for letters, key in degrees)
    diffusion = stage["heldout_diffusion_loss"]
    return (
        f"{name} stage, {short}: {stage['steps']} steps, {stage['tokens'] / 1e6:.2f}M tokens, training loss "
        f"{stage['first_train_loss']:.3f} -> {stage['last_train_loss']:.3f}, held-out AR {stage['heldout_ar_loss']:.3f}"
        + ("" if diffusion is None else f", held-out diffusion {diffusion:.3f}")
    )


def describe_drafter(drafter: dict[str, Any]) -> str:
    """Describe the draft adapter's training in one line."""
    evaluations = drafter["heldout_evaluations"]
    lengths = [f"{entry['acceptance_length']:.2f}" for entry in (evaluations[0], evaluations[-1])]
    return (
        f"drafter, rank {drafter['rank']}: {drafter['steps']} steps, {drafter['tokens'] / 1e6:.2f}M tokens, training "
        f"loss {drafter['first_train_loss']:.3f} -> {drafter['last_train_loss']:.3f}, held-out acceptance length "
        + " -> ".join(lengths)
    )
