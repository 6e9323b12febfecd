"""What is measured on a GPU: one pipeline slice of the 8B model; and the same at toy size, for any device."""

from dataclasses import dataclass, replace

import torch

from conf.composition.compose import compose_size
from conf.schema import Device, Dtype, ModelConfig, PrecisionConfig, Recompute, RuntimeConfig
from conf.system.errors import UserError
from model.megatron.kernel_choice import choose_transformer_engine
from tests.bench.joint.cases import Case

LENGTHS, ROUNDS = (4096, 16384), 10
TENSOR_PARALLEL = 4  # whose share of the vocabulary the head has
SLICE = ModelConfig("slice of 8B", 4, 4096, 14336, 32, 8, 128, 131072 // TENSOR_PARALLEL)
# Widths stand to each other as in the slice, so that layers keep as many tensors.
TOY, TOY_LENGTHS, TOY_ROUNDS = ModelConfig("toy", 2, 64, 224, 4, 1, 16, 256), (64,), 2


@dataclass(frozen=True)
class Settings:
    """Settings of one run of the benchmark.

    lengths: clean tokens. rounds: medians are taken of so many. fp8: precision of the run that is compared, or None.
    autotune: also time FlexAttention with tiles that inductor searches for, which takes minutes.
    """

    model: ModelConfig
    lengths: tuple[int, ...]
    rounds: int
    precision: PrecisionConfig
    runtime: RuntimeConfig
    fp8: PrecisionConfig | None = None
    autotune: bool = False

    def case(
        self, length: int, precision: PrecisionConfig | None = None, recompute: Recompute = Recompute.none
    ) -> Case:
        """Return the case of one sequence of so many tokens."""
        return Case(length, self.model.vocab_size, self.model, precision or self.precision, self.runtime, recompute)


def build_settings(toy: bool, fp8: PrecisionConfig | None = None, autotune: bool = False) -> Settings:
    """Build the slice in bf16, or a toy in bf16 on CUDA and in fp32 elsewhere.

    Raises UserError for the slice without CUDA.
    """
    has_cuda = torch.cuda.is_available()
    if not toy and not has_cuda:
        raise UserError("there is no CUDA device: the 8B slice needs one; --toy runs the same at small sizes.")
    precision = PrecisionConfig(Dtype.bf16 if has_cuda else Dtype.fp32)
    model, lengths, rounds = (TOY, TOY_LENGTHS, TOY_ROUNDS) if toy else (SLICE, LENGTHS, ROUNDS)
    runtime = RuntimeConfig(device=Device.auto)
    return Settings(model, lengths, rounds, precision, runtime, fp8, autotune)


def reshape(settings: Settings, layers: int | None, lengths: list[int] | None, rounds: int | None) -> Settings:
    """Return the settings with what the command line gives instead."""
    return replace(
        settings,
        model=replace(settings.model, num_layers=layers or settings.model.num_layers),
        lengths=tuple(lengths or settings.lengths),
        rounds=rounds or settings.rounds,
    )


def compose_fp8(overrides: list[str]) -> PrecisionConfig:
    """Compose precision=fp8 of conf/ with overrides such as precision.fp8=blockwise.

    Raises UserError where it cannot run.
    """
    found, reason = choose_transformer_engine()
    if not found:
        raise UserError(f"--fp8 needs Transformer Engine on a CUDA device: {reason}.")
    return compose_size(["model=ministral3_8b", "train.tokens=1e9", "precision=fp8", *overrides]).precision
