"""What rank 0 tells the person at the terminal: a progress bar and one line now and then (also in train.log)."""

import logging
import sys
from contextlib import AbstractContextManager

from rich.console import Console as RichConsole

from conf.schema import RunConfig
from pretrain.objective.losses import LossStats
from pretrain.reporting.progress import StepProgress
from pretrain.resume.start import StartPoint
from pretrain.run.data import RunData, count_samples, describe_blend, describe_overlap
from pretrain.run.distributed import Ranks
from pretrain.run.state import TrainState

logger = logging.getLogger(__name__)


class Console:
    """Silent on every rank but the first."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        self.rich = RichConsole(file=sys.stderr, highlight=False)
        shown = config.runtime.progress_bar and ranks.is_first
        self._progress = StepProgress(f"{config.stage.name} stage", self.rich, shown)

    def progress(self, state: TrainState) -> AbstractContextManager[None]:
        """Shows a progress bar over the token budget while the block runs."""
        return self._progress.show(self._config.num_steps, state.step)

    def say_start(self, start: StartPoint, parameters: int) -> None:
        """Layout, size and where the run begins."""
        origin = "fresh weights"
        if start.step_dir is not None:
            origin = f"resuming {start.step_dir} at step {start.state.step}"
        elif self._config.init_from:
            origin = f"weights from {self._config.init_from}"
        logger.info(
            f"{self._config.run.dir}: {self._config.num_steps} steps of {self._config.tokens_per_step} tokens, "
            f"{self._config.parallel.describe(self._ranks.world_size)}, {parameters / 1e6:.1f}M parameters on rank 0, "
            f"{self._ranks.device.type}; {origin}"
        )

    def say_data(self, data: RunData, state: TrainState) -> None:
        """What the run will have read of every source in the end."""
        for line in describe_blend(data.train, count_samples(self._config, state)):
            logger.info(line)
        if self._ranks.is_first:
            for line in describe_overlap(data):
                logger.warning(line)

    def say_end(self, state: TrainState, done_before: bool) -> None:
        """The run is complete, now or since an earlier start."""
        more = "; nothing was left to do (a larger train.tokens would continue it)" if done_before else ""
        logger.info(f"{self._config.run.dir}: complete at step {state.step}, {state.tokens_seen} tokens{more}")

    def say_step(self, state: TrainState, values: dict[str, float | int | None]) -> None:
        """Moves the bar; prints a line every runtime.log_every_steps steps."""
        note = f"loss {values['loss']:.4f} · {values['tokens_per_second']:.0f} tokens/s"
        self._progress.update(state.step, note)
        if state.step % self._config.runtime.log_every_steps == 0:
            shown = ("loss", "ar_loss", "diffusion_loss", "grad_norm", "lr", "tokens_per_second")
            parts = [f"{name} {values[name]:.5g}" for name in shown if values[name] is not None]
            logger.info(f"step {state.step}: " + ", ".join(parts))

    def say_heldout(self, state: TrainState, stats: LossStats) -> None:
        """Held-out losses."""
        diffusion = "" if stats.diffusion_loss is None else f", diffusion_loss {stats.diffusion_loss:.4f}"
        logger.info(f"step {state.step}: held-out ar_loss {stats.ar_loss:.4f}{diffusion}")
