"""Useful model FLOPs of training, and the peak of known devices. Recomputation is not counted.

Per sequence, forward = 2 * P_layers * rows + 4 * heads * head_dim * layers * pairs + 2 * hidden * vocab * scored rows;
training takes three times that (the backward computes two products for each of the forward).
"""

import torch

from conf.schema import ModelConfig, Objective, StageConfig

# Dense bf16 peak in FLOP/s by a part of the device's name (vendor data sheets, without sparsity).
PEAK_FLOPS_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def count_layer_parameters(model: ModelConfig) -> int:
    """Weights of all layers' matrices (norms not counted)."""
    attention = model.hidden_size * (2 * model.query_width + 2 * model.key_value_width)
    return model.num_layers * (attention + 3 * model.hidden_size * model.ffn_hidden_size)


def count_attention_pairs(sequence_length: int, stage: StageConfig) -> float:
    """Pairs of rows that see each other, one document per sequence."""
    if stage.objective is Objective.ar:
        return sequence_length * (sequence_length + 1) / 2
    return sequence_length**2 + sequence_length * (stage.block_size + 1) / 2


def compute_step_flops(
    model: ModelConfig, stage: StageConfig, sequence_length: int, num_sequences: int, scored_rows: int
) -> float:
    """FLOPs of one optimizer step over `num_sequences` sequences with `scored_rows` scored rows in all."""
    rows = sequence_length * (2 if stage.objective is Objective.joint else 1)
    layers = 2 * count_layer_parameters(model) * rows
    attention = 4 * model.query_width * model.num_layers * count_attention_pairs(sequence_length, stage)
    head = 2 * model.hidden_size * model.vocab_size * scored_rows
    return 3 * (num_sequences * (layers + attention) + head)


def find_peak_flops(device: torch.device) -> float | None:
    """bf16 peak of one device, or None where it is not known (CPUs, other GPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS_BF16.items() if part in name), None)
