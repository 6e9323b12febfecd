"""Benchmark of decoding: `make bench-decode` prints it, writes runs/bench/decode.json and runs/bench/decode.png.

It has three parts: one forward against the matmuls in it; a small model against plain loops over transformers; and, if
`make bench-drafter ARGS="--model medium --parts ranks"` has trained runs/medium and an adapter, how many forwards and
positions each way to decode needs.
"""

import argparse
import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from conf.system.atomic import atomic_write_bytes, atomic_write_text
from conf.system.entry import count
from tests.bench.decode.analyse import analyse
from tests.bench.decode.cost import measure_cost
from tests.bench.decode.forwards import measure_forwards
from tests.bench.decode.plot import draw_trained
from tests.bench.decode.report import build_bounds_table, build_forward_table, build_small_table, build_trained_table
from tests.bench.decode.small import measure_small_model
from tests.bench.decode.trained import decode_prompts, find_adapter, load_model
from tests.bench.medium import MEDIUM

OUTPUT = Path("runs/bench/decode.json")
PARTS = ("forwards", "small", "trained")
TRAINED_BY = 'make bench-drafter ARGS="--model medium --parts ranks"'
console = Console(width=132, highlight=False)


def main() -> None:
    """Measure, print and write each part in turn."""
    options = parse_options()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "threads": 1,
    }
    if "forwards" in options.parts:
        results["forwards"] = measure_forwards(10 if options.quick else 40)
        console.print(build_forward_table(results["forwards"]))
    if "small" in options.parts:
        results["small"] = measure_small_model(5 if options.quick else 15)
        console.print(build_small_table(results["small"]))
    if "trained" in options.parts:
        run_trained(options, results)
    atomic_write_text(options.output, json.dumps(results, indent=2) + "\n")
    console.print(f"[dim]{options.output}[/dim]")


def run_trained(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Run the third part, if there is a model for it."""
    if not (options.model / "export").is_dir() or not (options.model / "prompts").is_dir():
        console.print(f"{options.model} holds no trained model and prompts ({TRAINED_BY}): the third part is skipped")
        return
    if not find_adapter(options.model):
        console.print(f"{options.model} has no draft adapter of rank 128 ({TRAINED_BY}): measured without one")
    cost = measure_cost(load_model(options.model), 10 if options.quick else 40)
    per_group, max_new_tokens = (1, 64) if options.quick else (options.prompts, options.max_new_tokens)
    runs = decode_prompts(
        options.model, per_group=per_group, max_new_tokens=max_new_tokens, num_processes=options.processes
    )
    results["trained"] = trained = analyse(runs, cost)
    picture = options.output.with_suffix(".png")
    atomic_write_bytes(picture, draw_trained(trained))
    console.print(build_trained_table(trained), build_bounds_table(trained), f"[dim]{picture}[/dim]")


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_decode", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look in 2 minutes: 1 prompt per group, few rounds")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--prompts", type=count, default=8, metavar="N", help="per group; default: %(default)s")
    parser.add_argument("--max-new-tokens", type=count, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--processes", type=count, default=2, metavar="N", help="of prompts; default: %(default)s")
    parser.add_argument("--model", type=Path, default=MEDIUM.folder, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
