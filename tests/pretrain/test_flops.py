"""The arithmetic of useful FLOPs against counting by other means."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conf.schema import ModelConfig, Objective, StageConfig
from model.attention.layout import compute_dense_mask
from model.attention.plan import build_regular_layout
from pretrain.flops import compute_step_flops, count_attention_pairs, count_layer_parameters

MODEL = ModelConfig("toy", 3, 64, 160, 4, 2, 32, 512)


@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize(("length", "block_size"), [(64, 8), (96, 32), (32, 1)])
def test_pairs_are_the_sum_of_the_dense_mask(objective: Objective, length: int, block_size: int) -> None:
    stage = StageConfig("stage", objective, block_size)
    mask = compute_dense_mask(build_regular_layout(length, block_size, objective is Objective.joint))
    assert count_attention_pairs(length, stage) == mask.sum()


def test_layer_and_head_flops_equal_torchs_counter() -> None:
    shapes = [(64, 256), (128, 64), (64, 320), (160, 64)] * MODEL.num_layers
    rows, scored = 50, 20
    weights = [torch.randn(shape, requires_grad=True) for shape in shapes]
    assert count_layer_parameters(MODEL) == sum(weight.numel() for weight in weights)
    head = torch.randn(64, 512, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        for weight in weights:
            (torch.randn(rows, len(weight), requires_grad=True) @ weight).sum().backward()
        (torch.randn(scored, 64, requires_grad=True) @ head).sum().backward()
    stage = StageConfig("ar", Objective.ar)
    attention = 3 * 4 * 128 * 3 * count_attention_pairs(rows, stage)
    ours = compute_step_flops(MODEL, stage, rows, num_sequences=1, scored_rows=scored)
    assert ours - attention == counter.get_total_flops()
