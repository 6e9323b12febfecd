"""Benchmark of the joint step on a GPU: `make bench-gpu` prints it and writes runs/bench/gpu.json after every part.

One pipeline slice of the 8B model, ours against the public vendor recipe. `--toy` runs the same at small sizes on any
device, where its figures say nothing. What tests/bench/GPU.md records is printed by `--markdown`.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from conf.system.atomic import atomic_write_text
from conf.system.entry import OneLineParser, count, exit_status
from conf.system.errors import UserError
from tests.bench.gpu.parts import ORDER, run_part
from tests.bench.gpu.report import format_markdown, print_results
from tests.bench.gpu.settings import Settings, build_settings, compose_fp8, reshape
from tests.bench.gpu.steps import build_workbench
from tests.bench.joint.cases import BLOCK_SIZE
from tests.bench.joint.sides import trainer_session

OUTPUT = Path("runs/bench/gpu.json")
PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton")
BUDGET_MINUTES = 7.0
MOST_COMPILED_FORMS = 64  # of one function: shapes, masks and kernel options here are more than torch's 8


def main() -> None:
    """Measure, write after every part, print."""
    sys.exit(exit_status(run, interrupted="stopped; the parts that were finished are written"))


def run() -> None:
    """Measure, write and print; raise UserError for what cannot be measured or written."""
    arguments = parse_arguments(sys.argv[1:])
    fp8 = compose_fp8(arguments.override) if arguments.fp8 else None
    settings = build_settings(arguments.toy, fp8, arguments.autotune)
    settings = reshape(settings, arguments.layers, arguments.lengths, arguments.rounds)
    output: Path = arguments.output or (OUTPUT.with_stem("gpu_toy") if arguments.toy else OUTPUT)
    results = measure(settings, arguments.parts, output, arguments.budget_minutes)
    print_results(results, output)
    if arguments.markdown:
        print(format_markdown(results))


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """Parse the words of the command line."""
    parser = OneLineParser(prog="python -m tests.bench.bench_gpu", description=__doc__)
    parser.add_argument("--toy", action="store_true", help="small sizes, on any device")
    parser.add_argument("--parts", nargs="+", choices=ORDER, default=list(ORDER), help="in this order: %(default)s")
    parser.add_argument("--lengths", nargs="+", type=whole_blocks, help=f"clean tokens, in blocks of {BLOCK_SIZE}")
    parser.add_argument("--layers", type=count)
    parser.add_argument("--rounds", type=count, help="of which medians are taken")
    parser.add_argument("--budget-minutes", type=float, default=BUDGET_MINUTES, help="no part begins after these")
    parser.add_argument("--autotune", action="store_true", help="search tiles for FlexAttention too (minutes)")
    parser.add_argument("--fp8", action="store_true", help="our joint step with precision=fp8 too")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="of precision.*, for --fp8"
    )
    parser.add_argument("--output", type=Path, help=f"default {OUTPUT}; what is there of other parts is kept")
    parser.add_argument("--markdown", action="store_true", help="also print what GPU.md records")
    arguments = parser.parse_args(words)
    if arguments.override and not arguments.fp8:
        parser.error("--override is of --fp8: give that too")
    if arguments.parts == ["fp8"] and not arguments.fp8:
        parser.error("--parts fp8 measures nothing without --fp8")
    return arguments


def whole_blocks(text: str) -> int:
    """Parse a length in tokens, which must be a multiple of the block length."""
    value = count(text)
    if value % BLOCK_SIZE:
        raise argparse.ArgumentTypeError(f"{value} is not a multiple of the block length {BLOCK_SIZE}")
    return value


def measure(settings: Settings, parts: list[str], output: Path, budget_minutes: float) -> dict[str, Any]:
    """Measure the parts at all lengths; what is there is written after each."""
    started = time.monotonic()
    torch._dynamo.config.recompile_limit = MOST_COMPILED_FORMS
    torch._dynamo.config.automatic_dynamic_shapes = False  # each length for itself, as in a run, which has one
    shape = {**asdict(settings.model), "lengths": list(settings.lengths), "rounds": settings.rounds}
    results: dict[str, Any] = {
        "environment": describe_environment(),
        "settings": shape,
        "parts": read_parts(output, shape),
        "left_out": [],
    }
    write_results(results, output)
    with trainer_session(settings.runtime):
        bench = build_workbench(settings)
        for part in parts:
            for length in settings.lengths:
                if time.monotonic() - started > 60 * budget_minutes:
                    results["left_out"].append(f"{part}, L {length}: {budget_minutes:g} minutes were over")
                    continue
                begun = time.monotonic()
                results["parts"].setdefault(part, {})[str(length)] = run_part(bench, part, length)
                print(f"{part}, L {length}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
                results["environment"]["seconds"] = round(time.monotonic() - started)
                write_results(results, output)
    return results


def write_results(results: dict[str, Any], output: Path) -> None:
    """Write the results as JSON; raise UserError where that cannot be done."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(output, json.dumps(results, indent=2, default=str) + "\n")
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}. Give another --output.") from None


def read_parts(output: Path, shape: dict[str, Any]) -> dict[str, Any]:
    """Read the parts that an earlier run of the same shape left there: one run rarely has time for all."""
    try:
        found = json.loads(output.read_text(encoding="utf-8"))
        return found["parts"] if found["settings"] == json.loads(json.dumps(shape)) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def describe_environment() -> dict[str, Any]:
    """Return date, machine, versions and command."""
    versions = ", ".join(f"{package} {find_version(package)}" for package in PACKAGES)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": describe_device(),
        "versions": versions,
        "command": shlex.join(["python", "-m", "tests.bench.bench_gpu", *sys.argv[1:]]),
    }


def find_version(package: str) -> str:
    """Return the installed version, or none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def describe_device() -> str:
    """Return name, driver, clock and power limit, as nvidia-smi reports them."""
    if not torch.cuda.is_available():
        return "CPU"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
