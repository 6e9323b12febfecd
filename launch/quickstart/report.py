"""What the user sees at the end."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.quickstart.folder import QuickstartFolder

MODE_TITLES = {"ar": "AR", "block_diffusion": "block diffusion", "linear_speculation": "linear speculation"}


def print_report(console: Console, summary: dict[str, Any], folder: QuickstartFolder) -> None:
    """One table of modes, the stages in a line each, the checks, and where everything is."""
    console.print()
    console.print(build_mode_table(summary))
    for name, stage in summary["stages"].items():
        console.print(describe_stage(name, stage))
    console.print(f"unigram entropy of the held-out text: {summary['unigram_entropy']:.3f} nats per token")
    for check in summary["checks"]:
        mark = Text("ok  " if check["passed"] else "FAIL", style="green" if check["passed"] else "bold red")
        console.print(mark, f"{check['name']}: {check['value']} (wanted: {check['wanted']})")
    phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary["seconds"].items())
    console.print(f"seconds: {phases}")
    for what, path in (("export", folder.export), ("curves", folder.curves), ("summary", folder.summary)):
        console.print(f"{what}: {path}", soft_wrap=True)


def build_mode_table(summary: dict[str, Any]) -> Table:
    """Modes as rows; a dash where a number has no meaning."""
    decoding = summary["decoding"]
    table = Table(
        title=f"Greedy decoding of {decoding['num_prompts']} held-out prompts, {decoding['dtype']}, block "
        f"{decoding['block_length']}; real contexts: {decoding['num_contexts']} true prefixes",
        title_justify="left",
    )
    table.add_column("mode")
    for title in ("new\ntokens", "forwards", "tokens per\nforward", "acceptance\nlength", "real-context\nacceptance"):
        table.add_column(title, justify="right")
    for title in ("tokens/s", "equals\ngreedy AR", "distinct\n4-grams"):
        table.add_column(title, justify="right")
    for mode, values in summary["modes"].items():
        table.add_row(MODE_TITLES.get(mode, mode), *_cells(values))
    return table


def _cells(values: dict[str, Any]) -> list[str]:
    def number(name: str, digits: int) -> str:
        return "-" if values[name] is None else f"{values[name]:.{digits}f}"

    return [
        str(values["new_tokens"]),
        str(values["num_forwards"]),
        number("tokens_per_forward", 2),
        number("acceptance_length", 2),
        number("real_context_acceptance", 2),
        number("tokens_per_second", 0),
        "yes" if values["equals_greedy_ar"] else "no",
        number("distinct_4grams", 2),
    ]


def describe_stage(name: str, stage: dict[str, Any]) -> str:
    """One line about a training stage."""
    layout = stage["layout"]
    degrees = (("TP", "tensor_parallel"), ("PP", "pipeline_parallel"), ("DP", "data_parallel"))
    short = " ".join(f"{letters}{layout[key]}" for letters, key in degrees)
    diffusion = stage["heldout_diffusion_loss"]
    return (
        f"{name} stage, {short}: {stage['steps']} steps, {stage['tokens'] / 1e6:.2f}M tokens, training loss "
        f"{stage['first_train_loss']:.3f} -> {stage['last_train_loss']:.3f}, held-out AR {stage['heldout_ar_loss']:.3f}"
        + ("" if diffusion is None else f", held-out diffusion {diffusion:.3f}")
    )
