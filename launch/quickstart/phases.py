"""Phases that run once: a rerun continues with the first one that is not finished."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conf.system.atomic import atomic_write_text
from launch.quickstart.folder import load_json, remove


@dataclass(frozen=True)
class Phase:
    """One step of the quickstart.

    title: what the user reads. outputs: files and folders it makes; done means recorded, and all of them exist.
    keeps_partial_outputs: an unfinished run continues from what it left (training); otherwise it starts over.
    """

    name: str
    title: str
    outputs: list[Path]
    run: Callable[[], None]
    keeps_partial_outputs: bool = False


def run_phases(phases: list[Phase], record: Path, say: Callable[[str], None]) -> dict[str, float]:
    """Runs the phases in order and returns the seconds each took, also when that was in an earlier call.

    record: JSON file of finished phases. A phase that runs invalidates all later ones: their outputs are deleted.
    """
    seconds = load_json(record) if record.exists() else {}
    for number, phase in enumerate(phases):
        heading = f"[{number + 1}/{len(phases)}] {phase.title}"
        if _is_done(phase, seconds):
            say(f"{heading}: done before, {seconds[phase.name]:.0f} s")
            continue
        say(heading)
        _forget(phases[number:], seconds, record)
        started = time.perf_counter()
        phase.run()
        seconds[phase.name] = round(time.perf_counter() - started, 2)
        _save(seconds, record)
    return seconds


def _is_done(phase: Phase, seconds: dict[str, float]) -> bool:
    return phase.name in seconds and all(path.exists() for path in phase.outputs)


def _forget(phases: list[Phase], seconds: dict[str, float], record: Path) -> None:
    """Drop what the first of `phases` and all later ones left, except partial training of the first."""
    for phase in phases:
        seconds.pop(phase.name, None)
    _save(seconds, record)
    for phase in phases:
        if phase is phases[0] and phase.keeps_partial_outputs:
            continue
        for path in phase.outputs:
            remove(path)


def _save(seconds: dict[str, float], record: Path) -> None:
    atomic_write_text(record, json.dumps(seconds, indent=2) + "\n")
