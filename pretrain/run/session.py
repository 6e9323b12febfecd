"""RunSession: what a training run holds while it lasts, and what its ranks agree on. Both trainers stand on it.

Imports no megatron-core: lora/ trains without it.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from signal import Signals
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from rich.console import Console

from conf.schema import RuntimeConfig
from conf.schema.drafter import DrafterRuntimeConfig
from conf.system.errors import UserError
from pretrain.run import stop
from pretrain.run.integrity import find_intact_checkpoint
from pretrain.run.metrics import MetricsWriter, SilentMetrics
from pretrain.run.process_group import Ranks, join_process_group, run_on_first_rank
from pretrain.run.reporters import open_reporters
from pretrain.run.run_folder import lock_run_folder, plain, record_run
from pretrain.run.step_directory import StepDirectory
from pretrain.run.terminal import ProgressBar, start_logging


class RunSession:
    """Holds a run's processes, run folder, logs and metrics while the block runs.

    A trainer is a step() and an evaluate() on it. The drafter's looks like this; the stages' trainer, whose checkpoints
    megatron-core writes, uses its own Checkpointer and sends signals along with the step's Heartbeat:

        with RunSession(Path(config.run.dir), config.runtime) as session:
            newest = session.find_checkpoint(check_version)          # intact, or None: the run begins
            session.record_config(config, step)                      # config.yaml
            session.open_metrics(step, config)                       # metrics.jsonl, TensorBoard, Weights & Biases
            bar = session.progress_bar("title")
            with stop.deferred(), bar.show(num_steps, step):
                ...
                session.metrics.write("train", step, tokens_seen, values)
                if signal := session.agree_on_signal():
                    session.save_step(step, keep, write, write_manifest)
                    return stop.STATUS[signal]

    Entering joins torchrun's processes (or starts a group of one), locks the run folder and opens train.log. Every
    method but progress_bar is called by all ranks together, and what fails on one rank is raised on all at once: none
    is left waiting. After an error the process group is left as it is, because peers may be inside a collective.

    Attributes:
        run_dir: The run folder; nobody else writes to it.
        ranks: This process among those of the job, and its device.
        console: The terminal of this process.
        metrics: Writes metrics.jsonl; until open_metrics, and on every rank but the first, it writes nothing.
    """

    def __init__(self, run_dir: Path, runtime: RuntimeConfig | DrafterRuntimeConfig) -> None:
        self.run_dir = run_dir
        self.console = Console(file=sys.stderr, highlight=False)
        self.metrics: MetricsWriter = SilentMetrics()
        self.ranks: Ranks
        self._runtime = runtime
        self._held = ExitStack()

    def __enter__(self) -> Self:
        """Join the processes, lock the folder, start its log. Raises: UserError on every rank if one is impossible."""
        with self._held:
            joining = join_process_group(self._runtime.device, self._runtime.timeout_minutes)
            self.ranks = self._held.enter_context(joining)
            run_on_first_rank(lambda: self._held.enter_context(lock_run_folder(self.run_dir)))
            self._write_folder(lambda: start_logging(self.run_dir, self.console, is_first=True))
            if not self.ranks.is_first:
                start_logging(self.run_dir, self.console, is_first=False)
            self._held.callback(lambda: self.metrics.close())
            self._held = self._held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        """Close the metrics, let go of the folder and, unless there was an error, leave the process group."""
        return self._held.__exit__(kind, error, traceback)

    def _write_folder(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0. Raises: UserError on every rank if the run folder cannot be written."""
        try:
            run_on_first_rank(action)
        except OSError as error:
            raise UserError(f"run.dir={self.run_dir} cannot be written: {error}") from error

    def find_checkpoint(self, check_version: Callable[[Path], object], *, say: Any = None) -> Path | None:
        """Return the run's newest intact checkpoint; see find_intact_checkpoint."""
        options = {} if say is None else {"say": say}
        return find_intact_checkpoint(self.run_dir, check_version, **options)

    def record_config(self, config: Any, step: int) -> None:
        """Write config.yaml, the resolved configuration of the start at `step`. Raises: UserError."""
        self._write_folder(lambda: record_run(config, self.run_dir, step))

    def open_metrics(self, step: int, config: Any, *, wandb_project: str | None = None) -> None:
        """Continue metrics.jsonl after `step`, and whatever else gets the numbers. Raises: UserError."""
        self._write_folder(lambda: self._open_metrics(step, config, wandb_project))

    def _open_metrics(self, step: int, config: Any, wandb_project: str | None) -> None:
        tensorboard = self._runtime.tensorboard
        reporters = open_reporters(
            self.run_dir, step, tensorboard=tensorboard, wandb_project=wandb_project, config=plain(config)
        )
        self.metrics = MetricsWriter(self.run_dir, step, reporters)

    def progress_bar(self, title: str) -> ProgressBar:
        """Return a bar for rank 0's terminal, if runtime.progress_bar asks for it; one that shows nothing elsewhere."""
        return ProgressBar(title, self.console, self._runtime.progress_bar and self.ranks.is_first)

    def agree_on_signal(self) -> Signals | None:
        """Return the signal that some rank was sent, on every rank; None if no rank was sent any."""
        number = torch.tensor(stop.received() or 0, device=self.ranks.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return Signals(int(number)) if number else None

    def save_step(
        self, step: int, keep: int, write: Callable[[Path], object], write_manifest: Callable[[Path], object]
    ) -> None:
        """Write the checkpoint after `step` steps; it appears complete or not at all.

        Args:
            step: Optimizer steps done.
            keep: Newest checkpoints of the run that stay.
            write: Writes this rank's part into the folder it is given, on every rank. An error that it raises between
                two collectives of its own leaves the others waiting: keep such errors (DeferredErrors) and raise them
                at its end.
            write_manifest: Writes the last file, checkpoint.json, into that folder; on rank 0, when all have written.

        Raises:
            SaveError: On every rank if any rank fails; nothing half-written is left, earlier checkpoints stay.
        """
        directory = StepDirectory.of_step(self.run_dir, step, keep)
        with directory.explained():
            directory.begin()
            directory.write(lambda: write(directory.partial))
            directory.publish(write_manifest)
