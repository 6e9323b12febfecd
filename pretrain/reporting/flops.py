"""Useful model FLOPs of training, and the peak of known devices. Recomputation is not counted. Imports no torch.

Per sequence, forward = 2 * P_layers * rows + 4 * heads * head_dim * layers * pairs + 2 * hidden * vocab * scored rows;
training takes three times that (the backward computes two products for each of the forward).
"""

from typing import TYPE_CHECKING, NamedTuple

from conf.schema import ModelConfig

if TYPE_CHECKING:
    import torch

# Dense bf16 peak in FLOP/s by a part of the device's name (vendor data sheets, without sparsity).
PEAK_FLOPS_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


class StepFlops(NamedTuple):
    """FLOPs of one optimizer step: products with the layers' weights, attention, vocabulary head."""

    layers: int
    attention: int
    head: int


def count_step_flops(model: ModelConfig, rows: int, pairs: int, scored_rows: int) -> StepFlops:
    """FLOPs of one optimizer step by part; arguments as of compute_step_flops."""
    layers = 2 * model.num_layer_parameters * rows
    attention = 4 * model.query_width * model.num_layers * pairs
    head = 2 * model.hidden_size * model.vocab_size * scored_rows
    return StepFlops(3 * layers, 3 * attention, 3 * head)


def compute_step_flops(model: ModelConfig, rows: int, pairs: int, scored_rows: int) -> float:
    """FLOPs of one optimizer step.

    rows: of all sequences of the step, padding not counted (joint: both halves). pairs: of rows that see each other.
    """
    return sum(count_step_flops(model, rows, pairs, scored_rows))


def count_document_pairs(num_tokens: int, block_size: int, doubled: bool) -> int:
    """Pairs of rows that see each other in one document, whose last block may be short.

    Clean rows see clean rows causally; with `doubled`, noisy rows also see their own noisy block and the clean blocks
    before it (model/attention/visibility.py). For whole blocks: L (L + 1) / 2, and L^2 + L (block_size + 1) / 2.
    """
    causal = num_tokens * (num_tokens + 1) // 2
    if not doubled:
        return causal
    blocks, rest = divmod(num_tokens, block_size)
    noisy = block_size**2 * blocks * (blocks + 1) // 2 + rest * (blocks * block_size + rest)
    return causal + noisy


def find_peak_flops(device: "torch.device") -> float | None:
    """bf16 peak of one device, or None where it is not known (CPUs, other GPUs)."""
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS_BF16.items() if part in name), None)
