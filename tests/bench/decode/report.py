"""Builds the tables, which show each figure next to its bound."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tests.bench.decode import forwards, small
from tests.bench.decode.analyse import WANTED_GAIN

Figures = Mapping[str, Any]


def _judge(value: float, wanted: float | None, *, at_most: bool) -> tuple[str, str]:
    """Return the bound and whether it is met."""
    if wanted is None:
        return "", ""
    is_met = value <= wanted if at_most else value >= wanted
    return f"{'<=' if at_most else '>='} {wanted:g}x", "[green]met[/green]" if is_met else "[red]missed[/red]"


def build_forward_table(results: Figures) -> Table:
    """Build the table of one forward of each kind, and of what the prefill's head sees."""
    title = f"one forward after {forwards.NUM_CACHED} cached tokens, hidden 512, 8 layers, vocabulary 32768"
    table = Table("forward", "positions", "head positions", "ms", "floor, ms", "ratio", "wanted", "", title=title)
    for kind, values in results["by_kind"].items():
        times = [f"{1e3 * values[key]:.1f}" for key in ("seconds", "floor_seconds")]
        bound = _judge(values["ratio"], forwards.WANTED.get(kind), at_most=True)
        table.add_row(
            kind,
            str(values["num_positions"]),
            str(values["num_head_positions"]),
            *times,
            f"{values['ratio']:.3f}x",
            *bound,
        )
    for mode, count in results["prefill_head_positions"].items():
        table.add_row(f"prefill of {mode}", str(forwards.NUM_CACHED), str(count))
    return table


def build_small_table(results: Figures) -> Table:
    """Build the table of tokens per second against the plain loops."""
    sizes = results["sizes"]
    title = f"small model: hidden {sizes['hidden_size']}, 4 layers, vocabulary {sizes['vocab_size']}"
    table = Table("mode@block", "tokens/s", "plain loop", "ratio", "wanted", "", title=title)
    for name, values in results["by_mode"].items():
        rates = [f"{values[key]:.0f}" for key in ("tokens_per_second", "loop_tokens_per_second")]
        bound = _judge(values["ratio"], small.WANTED[name.partition("@")[0]], at_most=False)
        table.add_row(name, *rates, f"{values['ratio']:.2f}x", *bound)
    return table


def build_trained_table(results: Figures) -> Table:
    """Build the table of every setting on the trained model."""
    title = f"trained model, {results['num_prompts']} prompts"
    columns = ("tokens per forward", "per position", "acceptance", "tokens/s", "cost model", "agreement with AR")
    table = Table("setting", *columns, title=title)
    for name, values in results["by_setting"].items():
        length = values["acceptance_length"]
        table.add_row(
            name,
            f"{values['tokens_per_forward']:.3f}",
            f"{values['tokens_per_position']:.4f}",
            "" if length is None else f"{length:.2f}",
            f"{values['tokens_per_second']:.0f}",
            f"{values['speedup_here']:.2f}x",
            ", ".join(f"{count} {kind}" for kind, count in values["agreement"].items()),
        )
    return table


def build_bounds_table(results: Figures) -> Table:
    """Build the table of what the trained model should show, and of where each setting wins."""
    table = Table("figure", "measured", "wanted", "", title="fewer forwards, fewer positions")
    for family, gain in results["quadratic_over_linear"].items():
        interval = "" if gain["interval"] is None else " ({:.2f} to {:.2f})".format(*gain["interval"])
        bound = _judge(gain["ratio"], WANTED_GAIN, at_most=False)
        table.add_row(f"tokens per forward, {family} / linear", f"{gain['ratio']:.2f}x{interval}", *bound)
    agreement = results["agreement"]
    outcome = "[red]missed[/red]" if agreement["different"] else "[green]met[/green]"
    counts = f"{agreement['equal']} equal, {agreement['tie']} ties, {agreement['different']} different"
    table.add_row("speculative outputs and greedy AR's", counts, "none different", outcome)
    cost = results["cost"]
    seconds = (
        f"{1e3 * cost['fixed']:.2f} ms + {1e3 * cost['per_position']:.3f} ms per position: a / b = {cost['ratio']:.1f}"
    )
    table.add_row("cost of a forward here", seconds)
    for winner in results["winners"]:
        table.add_row(f"fastest from a / b = {winner['from_ratio']:.1f}", winner["name"])
    return table
