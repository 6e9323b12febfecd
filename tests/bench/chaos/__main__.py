"""Chaos test: `make chaos`, or python -m tests.bench.chaos --kills 3 --seed 7.

One toy run on two ranks is done undisturbed, then again while its ranks and its launcher are killed at random moments
and it is started again. The end must be the same, bit for bit. Then checkpoints are damaged, and each must be noticed.
Writes runs/bench/chaos.json; exit status 1 if anything was not as it must be.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from conf.system.atomic import atomic_write_text
from conf.system.entry import count
from model.checkpoint.checksums import find_damage
from tests.bench.chaos.compare import list_differences, load_curve
from tests.bench.chaos.damage import make_checkpoints, start_on_damage, try_damage
from tests.bench.chaos.job import NUM_RANKS, SAVE_EVERY, Job, Start
from tests.bench.chaos.kill import Durations, Outcome, strike
from tests.bench.chaos.plan import draw_kills
from tests.bench.chaos.watch import Phase, Watch, read_metrics
from tests.helpers.layouts import LAYOUTS
from tests.helpers.toy_data import ToyData, make_toy_data

FOLDER, OUTPUT = Path("runs/bench/chaos"), Path("runs/bench/chaos.json")
LONGEST_RUN = 900.0  # seconds, of a start that nobody kills
OTHER_DAMAGE = {"deleted": 10, "truncated": 10, "added": 5, "swapped": 5}
STARTS_ON_DAMAGE = (("flipped", "__0_0.distcp"), ("deleted", "checkpoint.json"), ("truncated", ".metadata"))

console = Console(width=120, highlight=False)


def main() -> None:
    """Run everything, then write the file of results."""
    options = parse_options()
    began = time.monotonic()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    data = make_toy_data(options.folder / "data")
    results = run_kills(options, data)
    if options.flips:
        results |= run_damage(options, data)
    results |= describe(options, time.monotonic() - began)
    atomic_write_text(options.output, json.dumps(results, indent=2) + "\n")
    console.print(f"{options.output}: {summarise(results)}")
    sys.exit(0 if is_good(results) else 1)


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.chaos",
        description="Kill a toy run at random moments, damage its checkpoints; it must end as if nothing had been.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--kills", type=count, default=50, help="starts that are killed")
    parser.add_argument("--seed", type=int, default=20261121, help="of ranks, signals, moments, damaged bytes")
    parser.add_argument("--steps", type=count, help="length of the run (default: enough for the kills)")
    parser.add_argument(
        "--layout", default="pp2", choices=LAYOUTS, help="layout of two ranks, by its name in tests/helpers/layouts.py"
    )
    parser.add_argument("--flips", type=int, default=100, help="flipped bytes; 0: no damaged checkpoints at all")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for data and runs; emptied first")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file for the results")
    options = parser.parse_args()
    options.steps = options.steps or max(12, 6 * options.kills)
    return options


def run_kills(options: argparse.Namespace, data: ToyData) -> dict[str, Any]:
    """Train the undisturbed and the disturbed run and compare them."""
    quiet = Job(data, options.folder, "undisturbed", options.steps, options.layout)
    job = Job(data, options.folder, "disturbed", options.steps, options.layout)
    durations = measure(quiet)
    console.print(f"undisturbed: {options.steps} steps; seconds of {durations}")
    outcomes = []
    for number, kill in enumerate(draw_kills(options.kills, options.seed, NUM_RANKS), start=1):
        outcomes.append(strike(job, kill, durations))
        console.print(describe_outcome(number, outcomes[-1]))
        if outcomes[-1].bad:
            console.print(f"[red]{'; '.join(outcomes[-1].bad)}[/red]")
    finish(job)
    differing = list_differences(quiet.run_dir, job.run_dir)
    return {
        **count_outcomes(outcomes),
        "weights_identical": not differing,
        "differing": differing[:20],
        "curve_identical": sorted(load_curve(quiet.run_dir)) == sorted(load_curve(job.run_dir)),
        "durations_seconds": {name: round(value, 3) for name, value in vars(durations).items()},
        "outcomes": [outcome.to_dict() for outcome in outcomes],
    }


def measure(job: Job) -> Durations:
    """Run a job to its end and return how long its phases last."""
    watch, began = Watch(job.run_dir, asynchronous=False), time.monotonic()
    start, seen = Start(job, asynchronous=False), {}
    while start.launcher.poll() is None:
        if watch.is_loading:
            seen.setdefault("start", time.monotonic() - began)
        if watch.trained:
            seen.setdefault("load", time.monotonic() - began - seen["start"])
            start.launcher.wait(LONGEST_RUN)
        time.sleep(0.02)
    assert start.launcher.returncode == 0, f"see {job.run_dir}/logs"
    lines = read_metrics(job.run_dir)
    steps = sorted(line["step_seconds"] for line in lines if line["kind"] == "train")
    saves = sorted(line["save_seconds"] for line in lines if line["kind"] == "checkpoint")
    step = steps[len(steps) // 2]
    # A start that resumes also reads and checks files; an evaluation is a few forwards.
    return Durations(seen["start"], 3 * seen["load"], step, saves[len(saves) // 2], 3 * step)


def finish(job: Job) -> None:
    """Let the job run to its end."""
    status = Start(job, asynchronous=False).launcher.wait(LONGEST_RUN)
    assert status == 0, f"status {status}: see {job.run_dir}/logs"


def count_outcomes(outcomes: list[Outcome]) -> dict[str, Any]:
    """Count outcomes over all kills."""
    hits = [outcome for outcome in outcomes if outcome.phase is not None]
    partial = [outcome for outcome in outcomes if any(" read step " in bad for bad in outcome.bad)]
    return {
        "kills": len(hits),
        "kills_asked": len(outcomes),
        "partial_checkpoints_loaded": len(partial),
        "lost_steps_max": max((outcome.lost_steps for outcome in hits), default=0),
        "lost_steps_total": sum(outcome.lost_steps for outcome in hits),
        "save_every_steps": SAVE_EVERY,
        "phases": {phase.value: sum(hit.phase is phase for hit in hits) for phase in Phase},
        "statuses": dict(Counter(f"{hit.kill.signal.name} {hit.status}" for hit in hits)),
        "end_seconds_max": max((hit.end_seconds for hit in hits), default=0.0),
        "bad": [f"kill {number}: {bad}" for number, hit in enumerate(outcomes, start=1) for bad in hit.bad],
    }


def run_damage(options: argparse.Namespace, data: ToyData) -> dict[str, Any]:
    """Damage files and see whether it is noticed; start runs that meet a damaged one."""
    job = Job(data, options.folder, "pp2", 2 * SAVE_EVERY, "pp2")
    step_dirs = make_checkpoints(job)
    assert not any(map(find_damage, step_dirs))
    trials = try_damage(step_dirs, {"flipped": options.flips, **OTHER_DAMAGE}, options.seed, options.folder)
    starts = {f"{kind} {file}": start_on_damage(job, kind, file, options.seed) for kind, file in STARTS_ON_DAMAGE}
    return {
        "corruptions_tried": trials["tried"]["flipped"],
        "corruptions_detected": trials["detected"].get("flipped", 0),
        "corruptions": trials,
        "starts_on_damage": {name: "; ".join(wrong) or "as they must" for name, wrong in starts.items()},
    }


def describe(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Return where the figures come from: options, machine, versions, date and command."""
    return {
        "seed": options.seed,
        "layout": options.layout,
        "steps": options.steps,
        "ranks": NUM_RANKS,
        "seconds": round(seconds),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m tests.bench.chaos {' '.join(sys.argv[1:])}".strip(),
    }


def describe_outcome(number: int, outcome: Outcome) -> str:
    """Describe an outcome on one line."""
    kill = outcome.kill
    whom = "launcher" if kill.rank < 0 else f"rank {kill.rank}"
    phase = outcome.phase.value if outcome.phase else "after its end"
    return (
        f"kill {number}: {kill.signal.name} to {whom} during {phase}: status {outcome.status} after "
        f"{outcome.end_seconds:.1f} s; began at {outcome.first_step}, reached {outcome.last_step}, "
        f"goes on at {outcome.next_step}"
    )


def summarise(results: dict[str, Any]) -> str:
    """Return the figures that count, on one line."""
    names = ("kills", "weights_identical", "curve_identical", "partial_checkpoints_loaded", "lost_steps_max")
    names += ("corruptions_tried", "corruptions_detected", "seconds")
    return ", ".join(f"{name} {results[name]}" for name in names if name in results)


def is_good(results: dict[str, Any]) -> bool:
    """Return whether everything is as it must be."""
    missed = results.get("corruptions", {}).get("missed", [])
    starts = set(results.get("starts_on_damage", {}).values()) <= {"as they must"}
    whole = results["weights_identical"] and results["curve_identical"] and results["kills"] == results["kills_asked"]
    return whole and starts and not missed and not results["bad"]


if __name__ == "__main__":
    main()
