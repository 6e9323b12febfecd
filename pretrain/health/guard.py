"""Steps that cannot be trusted: NaN or infinite gradients, and losses far above those before.

Every rank judges the same loss, and the worst verdict of any rank is everybody's (pretrain/health/heartbeat.py).
"""

import math
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from statistics import median
from typing import Any

from conf.schema import GuardConfig, SpikePolicy
from conf.system.errors import UserError


class Verdict(IntEnum):
    """What becomes of a step, the graver the larger."""

    good = 0
    spike = 1
    nonfinite = 2


@dataclass
class LossGuard:
    """Judges steps and counts the bad ones. A checkpoint keeps what it remembers (state), so resuming changes nothing.

    losses: of the last good steps, at most config.window. nonfinite: bad steps in a row. spikes: acted on in this run.
    """

    config: GuardConfig
    losses: deque[float] = field(init=False)
    nonfinite: int = 0
    spikes: int = 0

    def __post_init__(self) -> None:
        self.losses = deque(maxlen=self.config.window)

    def judge(self, loss: float, gradients_are_finite: bool) -> Verdict:
        """What to think of a step before its update. Until the window is half full nothing is a spike."""
        if not (math.isfinite(loss) and gradients_are_finite):
            return Verdict.nonfinite
        known = len(self.losses) >= (self.config.window + 1) // 2
        return Verdict.spike if known and loss > self.limit else Verdict.good

    def applies(self, verdict: Verdict) -> bool:
        """Whether a step's update is made."""
        reported = verdict is Verdict.spike and self.config.spike_policy is SpikePolicy.report
        return verdict is Verdict.good or reported

    @property
    def limit(self) -> float:
        """Loss above which a step is a spike, in nats."""
        return self.config.spike_factor * median(self.losses)

    def count(self, verdict: Verdict, loss: float, step: int) -> None:
        """Remember a step. Raises: UserError once there were more bad ones than the configuration allows."""
        self.nonfinite = self.nonfinite + 1 if verdict is Verdict.nonfinite else 0
        if verdict is Verdict.good:
            self.losses.append(loss)
        if self.nonfinite >= self.config.max_nonfinite_steps:
            raise UserError(
                f"the last {self.nonfinite} steps up to step {step} had NaN or infinite gradients; none was applied. "
                "Lower schedule.peak_lr or look at the data of these steps (sample indices are in metrics.jsonl), then "
                "give the same command again; guard.max_nonfinite_steps allows more."
            )
        acts = self.config.spike_policy is not SpikePolicy.report
        self.spikes += acts and verdict is Verdict.spike
        if self.spikes > self.config.max_spikes:
            raise UserError(
                f"step {step}: loss spike number {self.spikes}, guard.max_spikes={self.config.max_spikes}: lower "
                "schedule.peak_lr, or allow more."
            )

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"losses": list(self.losses), "nonfinite": self.nonfinite, "spikes": self.spikes}

    def restore(self, state: dict[str, Any]) -> None:
        """Remember what a checkpoint kept; nothing for one that kept nothing."""
        self.losses = deque(state.get("losses", ()), maxlen=self.config.window)
        self.nonfinite, self.spikes = state.get("nonfinite", 0), state.get("spikes", 0)
