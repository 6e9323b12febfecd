"""Slurm's commands as scripts on PATH: they note how they were called, and srun ends as the test says."""

import os
import subprocess
from pathlib import Path

from tests.helpers.processes import ROOT

# What they answer, for a job of two tasks. RANKS: what the ranks do, as shell; it may `save step_00000010`. Asked for
# the run folder (one task, in a container), srun runs what it is given.
SCRIPTS = {
    "srun": 'save() { mkdir -p "$LOG_DIR/checkpoints/$1"; }; [ "$1" = --nodes=1 ] && exec "${@:6}"; eval "$RANKS"',
    "scontrol": 'case "$1 $2" in "show hostnames") echo node7; echo node8 ;; "show job") echo " JobState=$JOB_STATE "; '
    ";; esac",
    "sbatch": 'echo "$(($(wc -l <"$CALLS")))"',
    "sleep": "exit 0",
}
OUTSIDE = ("SLURM_", "RANK", "WORLD_SIZE", "MASTER_", "LOCAL_RANK", "TORCHELASTIC_", "LOG_DIR", "MODULE")


class FakeSlurm:
    """folder: of the scripts and of `calls`, one line per call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "calls"
        self.log.touch()
        for name, text in SCRIPTS.items():
            path = folder / name
            path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"$CALLS"\n{text}\n')
            path.chmod(0o755)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A script of ours from the repository's root. environment: in addition to one without anything of Slurm."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OUTSIDE)}
        paths = {"PATH": f"{self.folder}:{os.environ['PATH']}", "CALLS": str(self.log), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, cwd=ROOT, env=kept | paths | environment, capture_output=True, text=True, timeout=120
        )

    def calls(self, name: str) -> list[str]:
        """Arguments of every call of a command."""
        lines = self.log.read_text().splitlines()
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]
