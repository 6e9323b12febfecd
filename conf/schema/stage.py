"""What a stage optimises."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING


class Objective(Enum):
    """ar: next-token loss alone. joint: next-token loss plus block diffusion on the doubled sequence."""

    ar = "ar"
    joint = "joint"


class LossNormalization(Enum):
    """global_average: one denominator, scored rows of both losses. per_objective: each sum by its own count."""

    global_average = "global_average"
    per_objective = "per_objective"


@dataclass
class StageConfig:
    """One training stage.

    name: ar, joint or sft; part of the noise seed and of the run name.
    objective: see Objective.
    chats_only: refuse data without context and answers, and declare the end of a turn as the end of an answer.
    block_size: tokens per diffusion block, in training and as the export's default for decoding.
    diffusion_weight: alpha in L_AR + alpha * L_diff.
    noise_epsilon: lowest masking probability; p = (1 - eps) * t + eps with t uniform in (0, 1).
    loss_normalization: see LossNormalization.
    """

    name: str = MISSING
    objective: Objective = Objective.ar
    chats_only: bool = False
    block_size: int = 32
    diffusion_weight: float = 0.3
    noise_epsilon: float = 1e-3
    loss_normalization: LossNormalization = LossNormalization.global_average

    @property
    def positions_per_token(self) -> int:
        """Positions of a forward per clean token: its own, and a noisy one in the joint stage."""
        return 2 if self.objective is Objective.joint else 1
