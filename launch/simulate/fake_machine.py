"""Start processes on a machine that seems to have a device, and take what they report."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.system.errors import UserError
from launch.simulate.device_kind import KINDS
from launch.simulate.fake_device import fake_cuda_environment, find_obstacle
from pretrain.run.run_folder import CONFIG_FILE, write_out

ROOT = Path(__file__).resolve().parents[2]
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class FakeMachine:
    """Holds the folder and the environment of processes. config: file of the configuration that they all read."""

    folder: Path
    environment: dict[str, str]
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def config(self) -> Path:
        """File of the configuration."""
        return self.folder / CONFIG_FILE

    def run(self, name: str, module: Sequence[str], *options: str) -> Path:
        """Run `python -m module CONFIG REPORT options` to its end, and return the report it wrote.

        name: of the report. module: with arguments that come first, if any. Raises: RuntimeError with the process's
        messages if there is no report.
        """
        report = self.folder / f"{name}.json"
        arguments = [sys.executable, "-m", *module, str(self.config), str(report), *options]
        with subprocess.Popen(
            arguments, cwd=ROOT, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            self._processes.append(process)
            _, output = process.communicate()
        if not report.exists():
            raise RuntimeError(f"{name} could not be simulated (exit status {process.returncode}):\n{output}")
        return report

    def end(self) -> None:
        """Kill all processes."""
        for process in self._processes:
            process.kill()


@contextmanager
def fake_machine(device: str, config: Any) -> Iterator[FakeMachine]:
    """Make a machine with one device of a kind (KINDS) for processes that read `config`; it leaves nothing on disk.

    Raises: UserError if this machine cannot pretend to be one.
    """
    obstacle = find_obstacle()
    if obstacle is not None:
        raise UserError(f"nothing can be simulated here: {obstacle}. launch.plan calculates without it.")
    with tempfile.TemporaryDirectory(prefix="simulate_") as folder, fake_cuda_environment(KINDS[device]) as clean:
        environment = {name: value for name, value in clean.items() if name not in RANK_VARIABLES}
        environment |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        machine = FakeMachine(Path(folder), environment)
        machine.config.write_text(write_out(config), encoding="utf-8")
        try:
            yield machine
        finally:
            machine.end()
