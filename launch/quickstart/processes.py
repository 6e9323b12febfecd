"""The commands a user would type, as the quickstart runs them."""

import os
import subprocess
import sys
from pathlib import Path

from conf.system.errors import UserError

NUM_PROCESSES = 2
SECONDS_TO_STOP = 60.0


def train_command(experiment: str, root: Path, overrides: list[str]) -> list[str]:
    """A training stage on two processes."""
    return [*_launcher(), "-m", "pretrain.train", f"experiment={experiment}", f"run.root={root}", *overrides]


def drafter_command(root: Path, overrides: list[str]) -> list[str]:
    """Training of the draft adapter on two processes."""
    return [*_launcher(), "-m", "lora.train", "experiment=quickstart", f"run.root={root}", *overrides]


def export_command(run_dir: Path, directory: Path) -> list[str]:
    """Megatron run to Hugging Face directory."""
    return [sys.executable, "-m", "model.convert", "--from", str(run_dir), "--to", str(directory)]


def decode_command(export: Path, heldout: Path, output: Path) -> list[str]:
    """Decoding of an export in a process of its own."""
    arguments = ["--export", str(export), "--heldout", str(heldout), "--output", str(output)]
    return [sys.executable, "-m", "launch.quickstart.decode", *arguments]


def chat_command(export: Path, prompt: str, mode: str, max_new_tokens: int) -> list[str]:
    """One answer as JSON, in a process of its own."""
    arguments = ["--prompt", prompt, "--mode", mode, "--max-new-tokens", str(max_new_tokens), "--json"]
    return [sys.executable, "-m", "model.chat", str(export), *arguments]


def read_output(what: str, command: list[str]) -> str:
    """Standard output of a command. Raises UserError naming it if it fails."""
    process = subprocess.Popen(command, env=quiet_environment(), stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate()
    if process.returncode:
        raise UserError(f"{what} failed (its message is above). The command was:\n  {' '.join(command)}")
    return output


def run_process(what: str, command: list[str]) -> None:
    """Run a command with this terminal. Raises UserError naming it if it fails; its own message stands above."""
    status = _wait(subprocess.Popen(command, env=quiet_environment()))
    if status:
        raise UserError(
            f"{what} failed with exit status {status} (its message is above). The command was:\n  {' '.join(command)}\n"
            "Run the quickstart again to continue from here, or with --fresh to start over."
        )


def quiet_environment() -> dict[str, str]:
    """More threads than cores make two gloo processes 20 to 50 times slower."""
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _launcher() -> list[str]:
    return [sys.executable, "-m", "launch.torchrun", "--standalone", f"--nproc_per_node={NUM_PROCESSES}"]


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Exit status. The terminal's interrupt reaches the process too: give it time to stop its own children."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
