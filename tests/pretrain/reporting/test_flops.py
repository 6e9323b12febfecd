"""The arithmetic of useful FLOPs against counting by other means."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from conf.schema import ModelConfig
from pretrain.reporting.flops import compute_step_flops

MODEL = ModelConfig("toy", 3, 64, 160, 4, 2, 32, 512)


def test_layer_and_head_flops_equal_torchs_counter() -> None:
    shapes = [(64, 256), (128, 64), (64, 320), (160, 64)] * MODEL.num_layers
    rows, scored = 50, 20
    weights = [torch.randn(shape, requires_grad=True) for shape in shapes]
    assert MODEL.num_layer_parameters == sum(weight.numel() for weight in weights)
    head = torch.randn(64, 512, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        for weight in weights:
            (torch.randn(rows, len(weight), requires_grad=True) @ weight).sum().backward()
        (torch.randn(scored, 64, requires_grad=True) @ head).sum().backward()
    pairs = 1000
    attention = 3 * 4 * 128 * 3 * pairs
    assert compute_step_flops(MODEL, rows, pairs, scored) - attention == counter.get_total_flops()
