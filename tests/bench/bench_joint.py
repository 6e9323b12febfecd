"""Benchmark of the joint step: `make bench-joint` prints it and writes runs/bench/joint.json and joint.png."""

import json
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from conf.system.atomic import atomic_write_text
from conf.system.entry import OneLineParser, exit_status
from tests.bench.joint.attention import compare_attention
from tests.bench.joint.balance import LENGTH, as_dictionaries, print_balance, simulate_balance
from tests.bench.joint.cases import CASES, QUICK_CASES, Case
from tests.bench.joint.economies import count_economies
from tests.bench.joint.memory import measure_memory
from tests.bench.joint.plot import plot_results
from tests.bench.joint.report import print_results
from tests.bench.joint.sides import OURS, REFERENCE, trainer_session
from tests.bench.joint.slope import measure_slope
from tests.bench.joint.speed import measure_parts, measure_profile, measure_speed

OUTPUT = Path("runs/bench/joint.json")
ROUNDS, QUICK_ROUNDS = 9, 2
LENGTHS, QUICK_LENGTHS = (512, 1024, 2048), (128, 256)
QUICK_LENGTH = 4096  # of the sequences that context-parallel ranks share


def main() -> None:
    """Measure, write, print."""
    parser = OneLineParser(prog="python -m tests.bench.bench_joint", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small case, few rounds: figures that say nothing")
    quick: bool = parser.parse_args().quick
    output = OUTPUT.with_stem("joint_quick") if quick else OUTPUT
    torch.set_num_threads(1)
    results = measure(quick)
    balance = simulate_balance(QUICK_LENGTH if quick else LENGTH)
    results["balance"] = as_dictionaries(balance)
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(output, json.dumps(results, indent=2) + "\n")
    plot_results(results, output.with_suffix(".png"))
    print_balance(Console(width=110, highlight=False), balance)
    print_results(results, output)


def measure(quick: bool) -> dict[str, Any]:
    """Measure everything, by case and by kind."""
    cases, rounds = (QUICK_CASES, QUICK_ROUNDS) if quick else (CASES, ROUNDS)
    lengths, vocab_size = (QUICK_LENGTHS, 4096) if quick else (LENGTHS, 32768)
    with trainer_session():
        results: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **{package: version(package) for package in ("torch", "megatron-core")},
            "threads": 1,
            "cases": {case.name: measure_case(case, rounds) for case in cases},
            "attention": {str(length): compare_attention(length, rounds) for length in lengths},
            "memory_by_length": measure_slope(vocab_size, lengths),
            "profile": measure_profile(cases[0]),
        }
    return results | {"economies": {case.name: count_economies(case) for case in cases}}


def measure_case(case: Case, rounds: int) -> dict[str, Any]:
    """Measure speed, parts and memory."""
    memory = {side: measure_memory(case, side) for side in (REFERENCE, OURS)}
    shares = {kind: memory[OURS][kind] / memory[REFERENCE][kind] for kind in ("resident", "live")}
    parts = measure_parts(case, rounds)
    return {
        "loss_chunk_rows": case.runtime.loss_chunk_rows,
        "speed": measure_speed(case, rounds),
        "parts": parts,
        "memory": memory | {"ratio": shares},
    }


if __name__ == "__main__":
    sys.exit(exit_status(main, interrupted="stopped; nothing was written"))
