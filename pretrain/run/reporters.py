"""Sends the numbers of metrics.jsonl to TensorBoard and Weights & Biases, too."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from conf.system.errors import UserError


class Reporter(Protocol):
    """Gets every number a run writes down, on rank 0."""

    def report(self, numbers: Mapping[str, float | int], step: int) -> None:
        """Report numbers: "<kind>/<name>" -> value."""

    def go_back(self, step: int) -> None:
        """Continue from an earlier step."""

    def close(self) -> None:
        """Bring everything to disk."""


class TensorBoardReporter:
    """Writes event files in `<run>/tensorboard`, which hide later steps than `step`: the run continues from it."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self._folder = str(run_dir / "tensorboard")
        self._open(step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=step + 1)

    def go_back(self, step: int) -> None:
        """Begin another event file, which hides later steps."""
        self._writer.close()
        self._open(step)

    def report(self, numbers: Mapping[str, float | int], step: int) -> None:
        """Write one scalar each."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WandbReporter:
    """Reports to a run of Weights & Biases named after the run folder; a resumed run continues it.

    config: the resolved configuration, as dictionaries. Raises: UserError if wandb is not installed or refuses.
    """

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "runtime.wandb_project is set and wandb is not installed: pip install 'tri-mode[wandb]', or leave "
                "the key out"
            ) from None
        # The id decides which run is continued: the folder, wherever it was started from.
        identity = hashlib.sha256(os.path.abspath(run_dir).encode()).hexdigest()[:16]
        try:
            self._run = wandb.init(
                project=project, name=run_dir.name, id=identity, resume="allow", dir=str(run_dir), config=config
            )
        except Exception as error:  # its errors have no common base that is public
            raise UserError(
                f"Weights & Biases refused runtime.wandb_project={project}: {error}. Log in with `wandb login`, set "
                "WANDB_MODE=offline, or leave the key out"
            ) from error
        self._run.define_metric("*", step_metric="step")  # its own step only grows, ours may go back

    def report(self, numbers: Mapping[str, float | int], step: int) -> None:
        """Log all of them under one step."""
        self._run.log({"step": step, **numbers})

    def go_back(self, step: int) -> None:
        """Do nothing: steps are a number like others there."""

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


def open_reporters(
    run_dir: Path,
    step: int,
    *,
    tensorboard: bool,
    wandb_project: str | None = None,
    config: dict[str, Any] | None = None,
) -> list[Reporter]:
    """Open the reporters a configuration asks for. Raises: UserError as WandbReporter."""
    reporters: list[Reporter] = []
    if tensorboard:
        reporters.append(TensorBoardReporter(run_dir, step))
    if wandb_project:
        reporters.append(WandbReporter(run_dir, wandb_project, config or {}))
    return reporters
