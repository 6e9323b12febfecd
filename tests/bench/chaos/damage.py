"""Trials of damaged checkpoints: what the trainer's check says of each, and whole starts that meet one."""

import json
import random
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from model.checkpoint.layout import CORRUPT_SUFFIX, find_newest_complete
from tests.bench.chaos.compare import list_differences, load_curve
from tests.bench.chaos.corruption import KINDS, Damage, apply, draw_damage, list_all_files
from tests.bench.chaos.job import NUM_RANKS, SAVE_EVERY, Job, Start
from tests.helpers.processes import run_ranks, train_many

LAYOUTS = ("single", "tp2_sp", "pp2")
LONGEST_START = 240.0  # seconds


def make_checkpoints(job: Job) -> list[Path]:
    """Train short runs in several layouts and return their newest checkpoints, two of each."""
    jobs = [replace(job, name=layout, layout=layout, steps=2 * SAVE_EVERY) for layout in LAYOUTS]
    for asynchronous in (False, True):
        train_many(
            NUM_RANKS, [run.overrides(asynchronous) for run in jobs if asynchronous == (run.name == "pp2")], job.root
        )
    return [path for run in jobs for path in sorted((run.run_dir / "checkpoints").glob("step_????????"))]


def try_damage(step_dirs: list[Path], counts: dict[str, int], seed: int, folder: Path) -> dict[str, Any]:
    """Damage files one after another. counts: kind -> trials. Returns what was tried, what was noticed."""
    source = random.Random(seed)
    trials = [draw_damage(step_dirs, kind, source) for kind in KINDS for _ in range(counts.get(kind, 0))]
    (folder / "trials.json").write_text(json.dumps([asdict(trial) for trial in trials]), encoding="utf-8")
    results = folder / "found.json"
    results.unlink(missing_ok=True)
    arguments = ("tests.bench.chaos.corruption", str(folder / "trials.json"), str(results))
    run_ranks(NUM_RANKS, *arguments, timeout=60 + 5 * len(trials))
    found = json.loads(results.read_text(encoding="utf-8"))
    noticed = [trial for trial, damage in zip(trials, found, strict=True) if damage]
    return {
        "tried": dict(Counter(trial.kind for trial in trials)),
        "detected": dict(Counter(trial.kind for trial in noticed)),
        "files": dict(Counter(_kind_of_file(trial.file) for trial in trials)),
        "missed": [asdict(trial) for trial in trials if trial not in noticed],
    }


def start_on_damage(job: Job, kind: str, file: str, seed: int) -> list[str]:
    """Damage the newest checkpoint of a copy of a finished run and start it: it must report that and end as before.

    file: pattern of the file that is damaged. Returns what is wrong.
    """
    copy = replace(job, name=f"{job.name}_{kind}")
    shutil.rmtree(copy.run_dir, ignore_errors=True)
    shutil.copytree(job.run_dir, copy.run_dir)
    newest = find_newest_complete(copy.run_dir)
    assert newest is not None
    files = list_all_files(newest)
    path = sorted(newest.glob(file))[0]
    source = random.Random(seed)
    damage = Damage(str(newest), kind, path.name, source.randrange(path.stat().st_size), source.randrange(1, 256))
    apply(damage, path, next(other for other in files if other != path), [])
    return _start_again(job, copy, newest)


def _start_again(job: Job, copy: Job, newest: Path) -> list[str]:
    log = copy.run_dir / "logs" / "rank_0.log"
    said_before = len(log.read_text(encoding="utf-8")) if log.exists() else 0
    status = Start(copy, asynchronous=False).launcher.wait(LONGEST_START)
    said = log.read_text(encoding="utf-8")[said_before:]
    wrong = [] if status == 0 else [f"status {status}"]
    if f"{newest} is damaged" not in said:
        wrong.append(f"nothing is said of the damage: {said[-500:]}")
    if not newest.with_name(newest.name + CORRUPT_SUFFIX).exists():
        wrong.append("the damaged checkpoint was not set aside")
    if differing := list_differences(job.run_dir, copy.run_dir):
        wrong.append(f"it did not end the same: {differing[:5]}")
    if sorted(load_curve(job.run_dir)) != sorted(load_curve(copy.run_dir)):
        wrong.append("another curve")
    return wrong


def _kind_of_file(name: str) -> str:
    return "*.distcp" if name.endswith(".distcp") else name
