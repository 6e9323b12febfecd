"""Run phases once, in order: a second call continues with the first phase that is not finished."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conf.system import entry
from conf.system.atomic import atomic_write_text
from conf.system.errors import UserError
from launch.quickstart.folder import load_json, remove

NUM_PROCESSES = 2
SECONDS_TO_STOP = 60.0


@dataclass(frozen=True)
class Phase:
    """One step of the quickstart.

    title: what the user reads. outputs: files and folders it writes; it is done when recorded and all of them exist.
    work: a function, or a command that becomes a process of its own. resumes: started again after an interruption, it
    continues from its partial outputs (training); otherwise these are deleted.
    """

    name: str
    title: str
    outputs: list[Path]
    work: Callable[[], None] | list[str]
    resumes: bool = False


def run_phases(phases: list[Phase], record: Path, show: Callable[[str], None]) -> dict[str, float]:
    """Run the phases in order and return the seconds each took, in this call or an earlier one.

    record: JSON file of finished phases. A phase that runs invalidates all later ones: their outputs are deleted.
    show: prints a line.
    """
    seconds = load_json(record) if record.exists() else {}
    for number, phase in enumerate(phases):
        heading = f"[{number + 1}/{len(phases)}] {phase.title}"
        if _is_done(phase, seconds):
            show(f"{heading}: done before, {seconds[phase.name]:.0f} s")
            continue
        show(heading)
        _forget(phases[number:], seconds, record)
        started = time.perf_counter()
        if callable(phase.work):
            phase.work()
        else:
            run_process(f"phase {phase.name}", phase.work)
        seconds[phase.name] = round(time.perf_counter() - started, 2)
        _save(seconds, record)
    return seconds


def _is_done(phase: Phase, seconds: dict[str, float]) -> bool:
    return phase.name in seconds and all(path.exists() for path in phase.outputs)


def _forget(phases: list[Phase], seconds: dict[str, float], record: Path) -> None:
    """Drop what the first of `phases` and all later ones left, except partial outputs the first one resumes from."""
    for phase in phases:
        seconds.pop(phase.name, None)
    _save(seconds, record)
    for phase in phases:
        if phase is phases[0] and phase.resumes:
            continue
        for path in phase.outputs:
            remove(path)


def _save(seconds: dict[str, float], record: Path) -> None:
    atomic_write_text(record, json.dumps(seconds, indent=2) + "\n")


def module_command(module: str, *arguments: object) -> list[str]:
    """Return the command `python -m module arguments`."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def two_process_command(module: str, *arguments: object) -> list[str]:
    """Return the command that runs a module on two ranks."""
    launcher = module_command("launch.torchrun", "--standalone", f"--nproc_per_node={NUM_PROCESSES}")
    return [*launcher, "-m", module, *map(str, arguments)]


def run_process(what: str, command: list[str]) -> None:
    """Run a command on this terminal.

    Raises:
        UserError: It failed; its own message is on the terminal, and `what` names it.
    """
    status = _wait(subprocess.Popen(command, env=_quiet_environment()))
    if status:
        raise UserError(
            f"{what} failed with exit status {status} (its message is above). The command was:\n  {' '.join(command)}\n"
            "Run the quickstart again to continue from here, or with --fresh to start over."
        )


def read_output(what: str, command: list[str]) -> str:
    """Return the standard output of a command.

    Raises:
        UserError: It failed; `what` names it.
    """
    process = subprocess.Popen(command, env=_quiet_environment(), stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate()
    if process.returncode:
        raise UserError(f"{what} failed (its message is above). The command was:\n  {' '.join(command)}")
    return output


def hide_library_messages() -> None:
    """Hide messages that libraries address to developers; call it before importing megatron-core or transformers.

    Messages of this project still show.
    """
    entry.quiet_libraries()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it found no other
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _quiet_environment() -> dict[str, str]:
    """Return this environment with one thread per process.

    More threads than cores make two gloo processes 20 to 50 times slower.
    """
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Return the exit status; after Ctrl-C, which reaches the process too, let it stop its own children first."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
