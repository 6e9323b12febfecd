"""Optimizer, learning-rate schedule and number formats."""

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from omegaconf import MISSING


class ScheduleKind(Enum):
    """wsd: warm-up, constant, decay at the end. cosine: warm-up, then half a cosine over the whole run."""

    wsd = "wsd"
    cosine = "cosine"


class DecayShape(Enum):
    """Curve of the WSD decay: linear, minus_sqrt (1 - sqrt(x)), cosine or exponential."""

    linear = "linear"
    minus_sqrt = "minus_sqrt"
    cosine = "cosine"
    exponential = "exponential"


class Dtype(Enum):
    """Format of weights and activations; gradients are reduced and optimizer state is held in fp32."""

    bf16 = "bf16"
    fp32 = "fp32"

    @property
    def num_bytes(self) -> int:
        """Bytes per element."""
        return {Dtype.bf16: 2, Dtype.fp32: 4}[self]


class Fp8Recipe(Enum):
    """Scaling of tensors to 8 bits in the matmuls within layers.

    tensorwise: one scale per tensor, gradients in e5m2 and the rest in e4m3. blockwise: one scale per 1 x 128
    activations or 128 x 128 weights, all in e4m3.
    """

    tensorwise = "tensorwise"
    blockwise = "blockwise"

    @property
    def multiple(self) -> int:
        """Number that must divide rows and columns of every matmul."""
        return {Fp8Recipe.tensorwise: 16, Fp8Recipe.blockwise: 128}[self]


class VisionPrecision(Enum):
    """Format in which the vision tower computes; its weights are stored in precision.dtype.

    fp32: exact, and slow on tensor cores. tf32: fp32 whose matmuls round their inputs to 10 bits. bf16: coarse.
    """

    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"

    @property
    def num_bytes(self) -> int:
        """Bytes per number."""
        return 2 if self is VisionPrecision.bf16 else 4


@dataclass
class OptimizerConfig:
    """AdamW and gradient clipping.

    beta1, beta2, epsilon: Adam's constants. weight_decay: decoupled, not applied to norms.
    clip_norm: largest global gradient norm; 0 switches clipping off.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclass
class ScheduleConfig:
    """Learning rate over a training's length: its token budget, or a drafter's steps.

    peak_lr, final_lr: learning rates after warm-up and at the end.
    warmup_fraction, decay_fraction: shares of the run (0 to 1); decay_fraction is used by wsd.
    decay_shape: curve of the wsd decay.
    """

    kind: ScheduleKind = ScheduleKind.wsd
    peak_lr: float = MISSING
    final_lr: float = MISSING
    warmup_fraction: float = 0.01
    decay_fraction: float = 0.2
    decay_shape: DecayShape = DecayShape.linear


@dataclass
class PrecisionConfig:
    """Number formats of training.

    dtype: format of weights and activations. fp8: 8-bit matmuls within layers, or null; weights, head and embedding
    stay in dtype. vision: see VisionPrecision.
    """

    dtype: Dtype = Dtype.bf16
    fp8: Optional[Fp8Recipe] = None
    vision: VisionPrecision = VisionPrecision.fp32
