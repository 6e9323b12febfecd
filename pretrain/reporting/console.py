"""What rank 0 tells the person at the terminal: a progress bar and one line now and then (also in train.log)."""

import logging
from contextlib import AbstractContextManager

from conf.schema import RunConfig
from pretrain.objective.losses import LossStats
from pretrain.resume.start_point import StartPoint
from pretrain.run.run_data import RunData, count_samples, describe_blend, describe_overlap
from pretrain.run.run_status import TrainState
from pretrain.run.session import RunSession
from pretrain.run.terminal import describe_values

logger = logging.getLogger(__name__)


class Console:
    """Silent on every rank but the first."""

    def __init__(self, config: RunConfig, session: RunSession) -> None:
        self._config, self._ranks = config, session.ranks
        self._progress = session.progress_bar(f"{config.stage.name} stage")

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
            logger.info(f"step {state.step}: {describe_values(values, shown)}")

    def say_heldout(self, state: TrainState, stats: LossStats) -> None:
        """Held-out losses."""
        diffusion = "" if stats.diffusion_loss is None else f", diffusion_loss {stats.diffusion_loss:.4f}"
        logger.info(f"step {state.step}: held-out ar_loss {stats.ar_loss:.4f}{diffusion}")
