"""Objective and noise of a training stage."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Objective(Enum):
    """ar: next-token loss alone. joint: next-token loss plus block diffusion on the doubled sequence."""

    ar = "ar"
    joint = "joint"


class LossNormalization(Enum):
    """Denominator of the loss, counted over all microbatches and data-parallel ranks of a step.

    S_ar is the sum of the cross entropies of N_clean scored clean positions, S_diffusion the sum of cross entropy / p
    of N_masked scored masked positions, alpha is diffusion_weight.
    global_average: (S_ar + alpha * S_diffusion) / (N_clean + N_masked), as the authors train.
    per_objective: S_ar / N_clean + alpha * S_diffusion / N_masked; as about half of the tokens are masked, this doubles
    the weight of diffusion relative to AR.
    The two terms are logged as ar_term and diffusion_term. The logged ar_loss is S_ar / N_clean and diffusion_loss is
    S_diffusion / N_maskable (tokens that could have been masked): the loss is the sum of the terms, not of these.
    """

    global_average = "global_average"
    per_objective = "per_objective"


class ModelPart(Enum):
    """text: embedding, decoder and head. tower: of vision. projector: what maps its features into the decoder."""

    text = "text"
    tower = "tower"
    projector = "projector"


@dataclass
class StageConfig:
    """Objective, noise and loss of one training stage, and the parts of the model that it trains.

    name: ar, joint, sft or vlm; part of the noise seed and of the run name.
    objective: see Objective.
    chats_only: refuse data without prompts and responses, and export the end of a turn as the end of a sequence.
    block_size: tokens per diffusion block, in training and as the export's default for decoding.
    diffusion_weight: alpha, the weight of diffusion beside AR; see loss_normalization.
    noise_epsilon: lowest masking probability; p = (1 - eps) * t + eps with t uniform in (0, 1).
    loss_normalization: see LossNormalization.
    freeze: parts of the model that are not trained: any of text, tower and projector.
    tower_lr, projector_lr: learning rates of these parts, relative to that of the text model.
    """

    name: str = MISSING
    objective: Objective = Objective.ar
    chats_only: bool = False
    block_size: int = 32
    diffusion_weight: float = 0.3
    noise_epsilon: float = 1e-3
    loss_normalization: LossNormalization = LossNormalization.global_average
    freeze: list[ModelPart] = field(default_factory=list)
    tower_lr: float = 1.0
    projector_lr: float = 1.0

    @property
    def positions_per_token(self) -> int:
        """Positions of a forward per clean token, at most: its own, and a noisy one in the joint stage."""
        return 2 if self.objective is Objective.joint else 1
