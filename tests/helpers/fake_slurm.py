"""Replace Slurm's commands by scripts on PATH that record their calls; srun runs what the test says."""

import os
import subprocess
from pathlib import Path

from tests.helpers.processes import ROOT

# The scripts act as for a job of two tasks. RANKS: shell code of the ranks, which may `save step_00000010`. With one
# task (the run folder, asked for in a container) srun runs the command it is given.
SCRIPTS = {
    "srun": 'save() { mkdir -p "$LOG_DIR/checkpoints/$1"; }; [ "$1" = --nodes=1 ] && exec "${@:6}"; eval "$RANKS"',
    "scontrol": 'case "$1 $2" in "show hostnames") echo node7; echo node8 ;; "show job") echo " JobState=$JOB_STATE "; '
    ";; esac",
    "sbatch": 'echo "$(($(wc -l <"$CALLS")))"',
    "sleep": "exit 0",
}
REMOVED_VARIABLES = ("SLURM_", "RANK", "WORLD_SIZE", "MASTER_", "LOCAL_RANK", "TORCHELASTIC_", "LOG_DIR", "MODULE")


class FakeSlurm:
    """Hold the scripts and `calls`, a line per call, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "calls"
        self.log.touch()
        for name, text in SCRIPTS.items():
            path = folder / name
            path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"$CALLS"\n{text}\n')
            path.chmod(0o755)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the repository's root. environment: added to one without Slurm's variables."""
        outside = {name: value for name, value in os.environ.items() if not name.startswith(REMOVED_VARIABLES)}
        paths = {"PATH": f"{self.folder}:{os.environ['PATH']}", "CALLS": str(self.log), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, cwd=ROOT, env=outside | paths | environment, capture_output=True, text=True, timeout=120
        )

    def calls(self, name: str) -> list[str]:
        """Return the arguments of every call of a command."""
        lines = self.log.read_text().splitlines()
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]
