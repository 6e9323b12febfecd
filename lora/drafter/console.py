"""What rank 0 tells the person at the terminal while a drafter trains."""

import logging
import sys
from contextlib import AbstractContextManager

from rich.console import Console as RichConsole

from conf.schema.drafter import DrafterConfig, ResponseSource
from lora.examples.run_examples import RunExamples
from pretrain.run.run_status import TrainState
from pretrain.run.terminal import ProgressBar

logger = logging.getLogger(__name__)
SHOWN = ("loss", "acceptance_length", "acceptance_length_sampled", "grad_norm", "lr", "blocks_per_second")


class DrafterConsole:
    """Lines in the log, a bar over the steps. is_first: whether this is rank 0."""

    def __init__(self, config: DrafterConfig, is_first: bool) -> None:
        self._config = config
        self.rich = RichConsole(file=sys.stderr, highlight=False)
        shown = config.runtime.progress_bar and is_first
        self._steps = ProgressBar("drafter", self.rich, shown)
        responds = config.responses.source is not ResponseSource.given
        self._responses = ProgressBar("responses", self.rich, shown and responds)

    def steps(self, state: TrainState) -> AbstractContextManager[None]:
        """A bar over the steps while the block runs."""
        return self._steps.show(self._config.train.steps, state.step)

    def responses(self) -> AbstractContextManager[None]:
        """Show a bar over the prompts this rank responds to, while the block runs."""
        return self._responses.show(1, 0)

    def count_responses(self, done: int, total: int) -> None:
        """Move the bar to `done` of rank 0's `total` prompts."""
        self._responses.update(done, f"{done} of {total} prompts", total)

    def say_start(self, data: RunExamples, parameters: int, origin: str) -> None:
        """What trains on what."""
        train = self._config.train
        logger.info(
            f"{self._config.run.dir}: {train.steps} steps of {train.global_batch_size} sequences with up to "
            f"{train.blocks_per_sequence} drafted blocks each; {parameters / 1e6:.2f}M trainable parameters; "
            f"{len(data.train)} sequences to train on, {len(data.heldout)} held out; {origin}"
        )

    def say_step(self, state: TrainState, values: dict[str, float | int | None]) -> None:
        """Moves the bar; prints a line every runtime.log_every_steps steps."""
        self._steps.update(state.step, f"loss {values['loss']:.4f} · {values['acceptance_length']:.2f} tokens a cycle")
        if state.step % self._config.runtime.log_every_steps == 0:
            logger.info(
                f"step {state.step}: "
                + ", ".join(f"{name} {values[name]:.5g}" for name in SHOWN if values[name] is not None)
            )

    def say_heldout(self, state: TrainState, values: dict[str, float | int | None]) -> None:
        """Held-out acceptance."""
        logger.info(
            f"step {state.step}: held-out acceptance length {values['acceptance_length']:.3f} (greedy), "
            f"{values['acceptance_length_sampled']:.3f} (sampled)"
        )

    def say_end(self, state: TrainState, output: str, done_before: bool) -> None:
        """The run is complete."""
        more = "; nothing was left to do (more train.steps would continue it)" if done_before else ""
        logger.info(f"{self._config.run.dir}: complete at step {state.step}; the adapter is in {output}{more}")
