"""Judges every step before its update: NaN or infinite gradients, and losses far above those before.

Every rank judges what all ranks know of the step (pretrain/health/heartbeat.py), so all come to the same verdict.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from statistics import median
from typing import Any

from conf.schema import GuardConfig, SpikePolicy
from conf.system.errors import UserError
from pretrain.objective.losses import StepNumbers

# Spikes in a row after which they are the level the loss has reached, from new data or settings, and spikes no more.
# Not above the default of guard.max_spikes, so that a run that skips spikes lives to see it.
LASTING_STEPS = 10


class StepVerdict(IntEnum):
    """Says what to think of a step; the worse the larger."""

    good = 0
    spike = 1
    nonfinite = 2


@dataclass
class LossGuard:
    """Judges steps and counts the bad ones. A checkpoint saves what it remembers (state), so resuming changes nothing.

    losses: of the last steps that were good, at most config.window. spike_losses: of the spikes since the last good
    step. nonfinite: bad steps in a row. spikes: acted on in this run.
    """

    config: GuardConfig
    losses: deque[float] = field(init=False)
    spike_losses: list[float] = field(default_factory=list)
    nonfinite: int = 0
    spikes: int = 0

    def __post_init__(self) -> None:
        self.losses = deque(maxlen=self.config.window)

    def judge(self, loss: float, gradients_are_finite: bool) -> StepVerdict:
        """Judge a step before its update. Until the window is half full nothing is a spike."""
        if not (math.isfinite(loss) and gradients_are_finite):
            return StepVerdict.nonfinite
        known = len(self.losses) >= (self.config.window + 1) // 2
        return StepVerdict.spike if known and loss > self.limit else StepVerdict.good

    def judge_worst(self, numbers: Sequence[StepNumbers]) -> StepVerdict:
        """Return the worst verdict of what ranks know of the same step; their sums may differ in the last bit."""
        different = {(one.loss, math.isfinite(one.grad_norm)) for one in numbers}
        return max(self.judge(loss, is_finite) for loss, is_finite in different)

    def applies(self, verdict: StepVerdict) -> bool:
        """Return whether the update of a step with this verdict is applied."""
        reported = verdict is StepVerdict.spike and self.config.spike_policy is SpikePolicy.report
        return verdict is StepVerdict.good or reported

    @property
    def limit(self) -> float:
        """Loss above which a step is a spike, in nats."""
        return self.config.spike_factor * median(self.losses)

    def count(self, verdict: StepVerdict, loss: float, step: int) -> None:
        """Remember a step. Raises: UserError once there were more bad ones than the configuration allows."""
        self.nonfinite = self.nonfinite + 1 if verdict is StepVerdict.nonfinite else 0
        if verdict is StepVerdict.good:
            self.losses.append(loss)
            self.spike_losses.clear()
        elif verdict is StepVerdict.spike:
            self._count_spike(loss)
        self._check_limits(step)

    def _count_spike(self, loss: float) -> None:
        """Count a spike; after LASTING_STEPS in a row the window begins again with them."""
        self.spikes += self.config.spike_policy is not SpikePolicy.report
        self.spike_losses.append(loss)
        if len(self.spike_losses) >= LASTING_STEPS:
            self.losses = deque(self.spike_losses, maxlen=self.config.window)
            self.spike_losses.clear()

    def _check_limits(self, step: int) -> None:
        if self.nonfinite >= self.config.max_nonfinite_steps:
            raise UserError(
                f"the last {self.nonfinite} steps up to step {step} had NaN or infinite gradients; none was applied. "
                "Lower schedule.peak_lr or look at the data of these steps (sample indices are in metrics.jsonl), then "
                "give the same command again; guard.max_nonfinite_steps allows more."
            )
        if self.spikes > self.config.max_spikes:
            raise UserError(
                f"step {step}: loss spike number {self.spikes}, guard.max_spikes={self.config.max_spikes}: lower "
                "schedule.peak_lr, or allow more."
            )

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint saves of the guard."""
        return {
            "losses": list(self.losses),
            "spike_losses": list(self.spike_losses),
            "nonfinite": self.nonfinite,
            "spikes": self.spikes,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Remember what a checkpoint saved; nothing for one that saved nothing."""
        self.losses = deque(state.get("losses", ()), maxlen=self.config.window)
        self.spike_losses = list(state.get("spike_losses", ()))
        self.nonfinite, self.spikes = state.get("nonfinite", 0), state.get("spikes", 0)

    def go_back(self, state: dict[str, Any]) -> None:
        """Remember what the checkpoint saved that the run goes back to, and the spikes since."""
        losses, spike_losses, spikes = self.losses, self.spike_losses, self.spikes
        self.restore(state)
        self.spike_losses, self.spikes = spike_losses, spikes
        if not spike_losses:  # the latest spike was one too many: its level is the new one
            self.losses = losses
