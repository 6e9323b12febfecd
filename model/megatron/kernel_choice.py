"""Choose which kernels and modules compute a layer on this machine, and say why.

What a configuration asks for and the machine lacks is rejected here, before a model is built.
"""

import importlib.util
from dataclasses import dataclass

import torch

from conf.schema import Fp8Recipe, ParallelConfig, PrecisionConfig, Recompute
from conf.system.errors import UserError

NOT_INSTALLED = "transformer_engine is not installed (make setup GPU=1)"
APEX_EXTENSION = "fused_weight_gradient_mlp_cuda"
# Transformer Engine's own conditions: oldest device and CUDA of a recipe.
FP8_NEEDS = {Fp8Recipe.tensorwise: ((8, 9), (12, 1)), Fp8Recipe.blockwise: ((9, 0), (12, 9))}
INSTALL = "`make setup GPU=1` on a machine with a CUDA device installs it"


@dataclass(frozen=True)
class Choice:
    """One decision for the log. of: what was chosen for. used: what computes it. reason: why."""

    of: str
    used: str
    reason: str

    def __str__(self) -> str:
        return f"{self.of}: {self.used} ({self.reason})"


def choose_transformer_engine() -> tuple[bool, str]:
    """Return whether to build Transformer Engine layers, and why."""
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    if not _has_transformer_engine():
        return False, NOT_INSTALLED
    return True, "CUDA device and transformer_engine found"


def choose_gradient_accumulation_fusion() -> tuple[bool, str]:
    """Return whether the matmuls of weight gradients add to the fp32 sums themselves, and why.

    Transformer Engine's layers do so without help; megatron-core's own need Apex's CUDA extension.
    """
    used, _ = choose_transformer_engine()
    if used:
        return True, "Transformer Engine's layers add to the fp32 sums themselves"
    found = torch.cuda.is_available() and importlib.util.find_spec(APEX_EXTENSION) is not None
    return found, f"Apex's {APEX_EXTENSION} {'found' if found else 'not found'}"


def choose_fused_operators() -> tuple[bool, str]:
    """Return whether SwiGLU, rotation and norms are one kernel each, torch's own or compiled, and why."""
    if torch.cuda.is_available():
        return True, "one kernel instead of several on CUDA"
    return False, "no CUDA device: without one, operators that save less for the backward pass are faster"


def choose_recomputed(recompute: Recompute) -> tuple[str, str]:
    """Return what the backward pass recomputes, and why."""
    asked = f"parallel.recompute={recompute.value}"
    if recompute is not Recompute.elementwise:
        return {Recompute.none: "nothing", Recompute.selective: "attention", Recompute.full: "layers"}[recompute], asked
    if choose_transformer_engine()[0]:
        return "SwiGLU's output", f"{asked}; Transformer Engine's matmuls contain their norms and save the outputs"
    return "outputs of norms and SwiGLU", asked


def list_choices(recompute: Recompute) -> list[Choice]:
    """Return all choices, for the log."""
    engine, engine_reason = choose_transformer_engine()
    fusion, fusion_reason = choose_gradient_accumulation_fusion()
    fused, fused_reason = choose_fused_operators()
    norm = "torch's fused kernel" if fused else "model/megatron/operators.py"
    return [
        Choice("layers", "Transformer Engine" if engine else "megatron-core", engine_reason),
        Choice("gradient_accumulation_fusion", "on" if fusion else "off", fusion_reason),
        Choice("norms", "Transformer Engine" if engine else norm, engine_reason if engine else fused_reason),
        Choice("SwiGLU", "megatron-core's, compiled" if fused else "model/megatron/operators.py", fused_reason),
        Choice("rotation", "compiled" if fused else "operator by operator", fused_reason),
        Choice("residual", "one addition", "without bias and dropout there is nothing to fuse it with"),
        Choice("recomputed", *choose_recomputed(recompute)),
    ]


def check_machine(parallel: ParallelConfig, precision: PrecisionConfig) -> None:
    """Check that this machine has what the configuration asks for.

    Raises:
        UserError: It lacks something.
    """
    used, reason = choose_transformer_engine()
    if not used:
        require_no_transformer_engine(parallel, precision, f"{reason}. {INSTALL}")
    if precision.fp8 is not None:
        _check_fp8(precision.fp8)


def check_packages(parallel: ParallelConfig, precision: PrecisionConfig) -> None:
    """Check that this environment could give some machine what the configuration asks for.

    Raises:
        UserError: A package is missing.
    """
    if not _has_transformer_engine():
        require_no_transformer_engine(parallel, precision, f"{NOT_INSTALLED}. {INSTALL}")


def _has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def require_no_transformer_engine(parallel: ParallelConfig, precision: PrecisionConfig, reason: str) -> None:
    """Raise UserError if the configuration asks for something of Transformer Engine; reason: why there is none."""
    asked = {
        "parallel.overlap_tensor_parallel=true": (parallel.overlap_tensor_parallel, "false"),
        f"parallel.offload_layers={parallel.offload_layers}": (parallel.offload_layers > 0, "0"),
        f"precision.fp8={precision.fp8.value if precision.fp8 else None}": (precision.fp8 is not None, "null"),
    }
    for key, (is_asked, without) in asked.items():
        if is_asked:
            name = key.partition("=")[0]
            raise UserError(f"{key} needs Transformer Engine, and there is none: {reason}; or {name}={without}.")


def _check_fp8(recipe: Fp8Recipe) -> None:
    device, cuda = torch.cuda.get_device_capability(), torch.version.cuda or "0.0"
    least_device, least_cuda = FP8_NEEDS[recipe]
    if device < least_device or tuple(map(int, cuda.split(".")[:2])) < least_cuda:
        raise UserError(
            f"precision.fp8={recipe.value} needs a device of compute capability {_dotted(least_device)} (H100 has 9.0) "
            f"and torch built for CUDA {_dotted(least_cuda)} or newer; here it is {_dotted(device)} and {cuda}: use "
            "precision.fp8=null."
        )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
