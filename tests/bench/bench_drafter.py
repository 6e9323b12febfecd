"""Benchmark of the draft adapter: `make bench-drafter` prints it and writes runs/bench/drafter.json.

Trains a model first (20 minutes on two cores; `--model medium`: an hour), then every adapter of a part of variants.py
at equal steps, and decodes held-out prompts with each. What is there already is used. Interrupted, the same command
continues.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

from rich.console import Console

from conf.system.atomic import atomic_write_text
from tests.bench.drafter.compare import build_table, compare
from tests.bench.drafter.measure import is_measured, measure_command, write_prompts
from tests.bench.drafter.memory import measure_memory
from tests.bench.drafter.variants import PARTS, Variant
from tests.bench.medium import MODELS, BenchModel
from tests.bench.processes import run_all

OUTPUT = Path("runs/bench/drafter.json")
AT_ONCE = 2  # adapters trained or measured at a time: one per core


def main() -> None:
    """Train, measure, write, print."""
    options = parse_options()
    model = MODELS[options.model]
    model.build()
    results: dict[str, Any] = {
        "model": options.model,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed")},
        "diffusion_loss_fall_over_last_fifth": model.measure_flatness(),
    }
    console = Console(width=240)
    for part in options.parts:
        results[part] = measure_memory() if part == "memory" else run_part(model, PARTS[part])
        atomic_write_text(OUTPUT, json.dumps(results, indent=2) + "\n")
        console.print(json.dumps(results[part], indent=2) if part == "memory" else build_table(part, results[part]))
    console.print(f"[dim]{OUTPUT}[/dim]")


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_drafter", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="small", help="default: %(default)s")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "memory"], default=["objectives"])
    return parser.parse_args()


def run_part(model: BenchModel, variants: tuple[Variant, ...]) -> dict[str, Any]:
    """Train and measure every variant, and compare them."""
    prompts = write_prompts(model)
    # One first: it decodes the responses that the others find in the cache.
    _train_and_measure(model, variants[0], prompts)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        others = (None, *variants[1:])
        list(pool.map(_train_and_measure, repeat(model), others, repeat(prompts)))
    return compare(model, variants)


def _train_and_measure(model: BenchModel, variant: Variant | None, prompts: Path) -> None:
    if variant is not None:
        run_all([variant.command(model, sys.executable)])
    if not is_measured(model, variant):
        run_all([measure_command(model, prompts, variant)])


if __name__ == "__main__":
    main()
