"""Useful model FLOPs of training, and the peak of known devices. Recomputation is not counted.

Per sequence, forward = 2 * P_layers * rows + 4 * heads * head_dim * layers * pairs + 2 * hidden * vocab * scored rows;
training takes three times that (the backward computes two products for each of the forward).
"""

import torch

from conf.schema import ModelConfig

# Dense bf16 peak in FLOP/s by a part of the device's name (vendor data sheets, without sparsity).
PEAK_FLOPS_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def count_layer_parameters(model: ModelConfig) -> int:
    """Weights of all layers' matrices (norms not counted)."""
    attention = model.hidden_size * (2 * model.query_width + 2 * model.key_value_width)
    return model.num_layers * (attention + 3 * model.hidden_size * model.ffn_hidden_size)


def compute_step_flops(model: ModelConfig, rows: int, pairs: int, scored_rows: int) -> float:
    """FLOPs of one optimizer step.

    rows: of all sequences of the step, filler not counted (joint: both halves). pairs: of rows that see each other.
    """
    layers = 2 * count_layer_parameters(model) * rows
    attention = 4 * model.query_width * model.num_layers * pairs
    head = 2 * model.hidden_size * model.vocab_size * scored_rows
    return 3 * (layers + attention + head)


def find_peak_flops(device: torch.device) -> float | None:
    """bf16 peak of one device, or None where it is not known (CPUs, other GPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS_BF16.items() if part in name), None)
