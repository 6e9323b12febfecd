"""Benchmark of the draft adapter: `make bench-drafter` prints it and writes runs/bench/drafter.json.

Trains the medium model first (about an hour on two cores), then every adapter of variants.py; what is there already is
used. Interrupted, the same command continues.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from conf.system.atomic import atomic_write_text
from tests.bench.drafter.measure import (
    PROMPTS,
    SHORT_PROMPTS,
    evaluate_command,
    is_measured,
    read_result,
    write_prompts,
)
from tests.bench.drafter.memory import measure_memory
from tests.bench.drafter.variants import DEFAULT_OBJECTIVE, MAIN, OBJECTIVES, TEXTS, Variant
from tests.bench.medium import build_medium_model, measure_flatness
from tests.bench.processes import run_all

OUTPUT = Path("runs/bench/drafter.json")
WANTED_GAIN, WANTED_ACCEPTANCE, WANTED_FLATNESS = 32.5, 2.0, 0.01
AT_ONCE = 2  # adapters trained or measured at a time: one per core


def main() -> None:
    """Train, measure, write, print."""
    build_medium_model()
    short = (*OBJECTIVES, *TEXTS)
    # One first: it decodes the responses that the others find in the cache.
    run_all([MAIN[0].command(sys.executable)])
    run_all([variant.command(sys.executable) for variant in (MAIN[1], *short)], AT_ONCE)
    prompts = write_prompts()
    commands = [
        evaluate_command(variant, prompts, PROMPTS if variant in MAIN else SHORT_PROMPTS)
        for variant in (*MAIN, *short)
        if not is_measured(variant)
    ]
    run_all(commands, AT_ONCE)
    results = collect_results() | measure_memory()
    atomic_write_text(OUTPUT, json.dumps(results, indent=2) + "\n")
    print_results(results)


def collect_results() -> dict[str, Any]:
    """Return everything that was measured; the variants of the published rank come first."""
    by_rank = {variant.name: read_result(variant) for variant in MAIN}
    return {
        **by_rank[MAIN[0].name],
        "by_rank": by_rank,
        "by_objective": _read_all(OBJECTIVES),
        "by_text": {"text_greedy": read_result(_default())} | _read_all(TEXTS),
        "diffusion_loss_fall_over_last_fifth": measure_flatness(),
    }


def _read_all(variants: tuple[Variant, ...]) -> dict[str, Any]:
    return {variant.name: read_result(variant) for variant in variants}


def _default() -> Variant:
    return next(variant for variant in OBJECTIVES if variant.name == DEFAULT_OBJECTIVE)


def print_results(results: dict[str, Any]) -> None:
    """Print each figure next to the bound it must keep, then the comparisons."""
    console = Console(width=100)
    table = Table("figure", "measured", "wanted", title="draft adapter")
    for name, values in results["by_rank"].items():
        low, high = values["interval"]
        gain = f"{values['gain_percent']:+.1f} % ({low:+.1f} to {high:+.1f})"
        table.add_row(f"tokens per forward, {name}", gain, f">= +{WANTED_GAIN} %, interval above 0")
        lengths = f"{values['acceptance_length_before']:.2f} -> {values['acceptance_length_after']:.2f}"
        table.add_row(f"acceptance length, {name}", lengths, f">= {WANTED_ACCEPTANCE} before")
        table.add_row(f"equals greedy AR, {name}", "yes" if values["equals_greedy_ar"] else "no", "yes")
    flat = results["diffusion_loss_fall_over_last_fifth"]
    table.add_row("fall of the diffusion loss over the last fifth", f"{flat:.2%}", f"< {WANTED_FLATNESS:.0%}")
    parts = results["memory_vocabulary_bytes_by_sequence_length"]
    sizes = ", ".join(f"{length}: {value / 1e6:.0f} MB" for length, value in parts.items())
    table.add_row("memory of the vocabulary by sequence length", sizes, "equal")
    console.print(table)
    for key, title in (("by_objective", "objectives at equal steps"), ("by_text", "drafted text at equal steps")):
        console.print(_build_comparison(title, results[key]))
    console.print(f"[dim]{OUTPUT}[/dim]")


def _build_comparison(title: str, results: dict[str, Any]) -> Table:
    table = Table("", "tokens per forward", "interval", "acceptance length", "held-out text", title=title)
    for name, values in sorted(results.items(), key=lambda item: -item[1]["gain_percent"]):
        low, high = values["interval"]
        table.add_row(
            name,
            f"{values['gain_percent']:+.1f} %",
            f"{low:+.1f} to {high:+.1f}",
            f"{values['acceptance_length_before']:.2f} -> {values['acceptance_length_after']:.2f}",
            " -> ".join(f"{value:.2f}" for value in values["heldout_acceptance_length"]),
        )
    return table


if __name__ == "__main__":
    main()
