"""What a run costs, from its configuration alone: FLOPs of a step, bytes of a checkpoint. Imports no torch.

FLOPs are the useful ones of the model; recomputation is not counted.

Per sequence, forward = 2 * P_layers * positions + 4 * heads * head_dim * layers * attended_pairs
+ 2 * hidden * vocab * scored_positions; training takes three times that (the backward computes two matmuls for each of
the forward). Images add 2 * P_tower * patches + 4 * tower width * tower layers * attended_patches + 2 * P_projector *
features. What is frozen counts as if it were trained.
"""

from typing import TYPE_CHECKING, NamedTuple

from conf.schema import Dtype, ModelConfig, VisionConfig

if TYPE_CHECKING:
    import torch

# Dense bf16 peak in FLOP/s by a part of the device's name (vendor data sheets, without sparsity).
PEAK_FLOPS_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}

# megatron-core's distributed optimizer saves three fp32 numbers per parameter, also where the weights are fp32
# themselves (distrib_optimizer.py, "fully_reshardable": param, exp_avg, exp_avg_sq).
OPTIMIZER_BYTES = 3 * Dtype.fp32.num_bytes
# Files hold a little more than the tensors (.metadata, padding); seen: under 1 % at 1.8M parameters, less above.
FILES_MARGIN = 1.01
# What must be free before one is written, over its tensors; files were up to 3 % larger.
SPACE_MARGIN = 1.05


class StepFlops(NamedTuple):
    """Holds FLOPs of one optimizer step: matmuls with the layers' weights, attention, vocabulary head, and images."""

    layers: int
    attention: int
    head: int
    vision: int = 0


class FlopRates(NamedTuple):
    """Holds FLOPs of training per position, attended pair, scored position, patch, and pair of patches of an image."""

    position: int
    attended_pair: int
    scored_position: int
    patch: int = 0
    attended_patch: int = 0


def compute_flop_rates(model: ModelConfig) -> FlopRates:
    """Return what each unit of a step costs: one optimizer step is the sum of its units."""
    return FlopRates(
        3 * 2 * model.num_layer_parameters,
        3 * 4 * model.query_width * model.num_layers,
        3 * 2 * model.hidden_size * model.vocab_size,
        *(_compute_vision_rates(model.vision, model.hidden_size) if model.vision else (0, 0)),
    )


def _compute_vision_rates(vision: VisionConfig, hidden_size: int) -> tuple[int, int]:
    """Return the FLOPs of training per patch, with its share of a feature, and per pair of patches of an image."""
    width = vision.hidden_size
    layer = 4 * width**2 + 3 * width * vision.ffn_hidden_size
    projector = width * vision.merged_width + hidden_size * (width + hidden_size)
    weights = vision.num_layers * layer + width * vision.patch_width
    return 3 * 2 * weights + 3 * 2 * projector // vision.merge_size**2, 3 * 4 * width * vision.num_layers


def count_step_flops(
    model: ModelConfig,
    positions: int,
    attended_pairs: int,
    scored_positions: int,
    patches: int = 0,
    attended_patches: int = 0,
) -> StepFlops:
    """Return FLOPs of one optimizer step by part.

    positions: of all sequences of the step, padding not counted (joint: both halves). attended_pairs: of a query and a
    key it attends to. patches: of all images. attended_patches: of patches of the same image.
    """
    rates = compute_flop_rates(model)
    return StepFlops(
        rates.position * positions,
        rates.attended_pair * attended_pairs,
        rates.scored_position * scored_positions,
        rates.patch * patches + rates.attended_patch * attended_patches,
    )


def count_attended_pairs(num_tokens: int, block_size: int, doubled: bool) -> int:
    """Count the attended pairs of one document, whose last block may be short.

    Clean tokens attend causally to clean ones; with `doubled`, noisy tokens also attend to their own noisy block and to
    the clean blocks before it (model/attention/visibility.py). For whole blocks: L (L + 1) / 2, and
    L^2 + L (block_size + 1) / 2.
    """
    causal = num_tokens * (num_tokens + 1) // 2
    if not doubled:
        return causal
    blocks, rest = divmod(num_tokens, block_size)
    noisy = block_size**2 * blocks * (blocks + 1) // 2 + rest * (blocks * block_size + rest)
    return causal + noisy


def find_peak_flops(device: "torch.device") -> float | None:
    """Return the bf16 peak of one device in FLOP/s, or None where it is not known (CPUs, other GPUs)."""
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS_BF16.items() if part in name), None)


def compute_checkpoint_bytes(model: ModelConfig, dtype: Dtype) -> int:
    """Return the bytes of one step directory: its tensors and what else lies in their files."""
    return int(compute_tensor_bytes(model, dtype) * FILES_MARGIN)


def compute_tensor_bytes(model: ModelConfig, dtype: Dtype) -> int:
    """Return the bytes of a checkpoint's tensors: weights in `dtype` and the optimizer's fp32 weights and two moments.

    The layout does not matter: every number is written once, whichever ranks hold it.
    """
    return model.num_parameters * (dtype.num_bytes + OPTIMIZER_BYTES)
