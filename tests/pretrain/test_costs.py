"""FLOPs and bytes against counting by other means; tests/distributed/test_checkpoint.py compares real checkpoints."""

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Ministral3ForCausalLM

from conf.schema import Dtype, ModelConfig
from pretrain.costs import compute_checkpoint_bytes, compute_step_flops
from tests.helpers.tiny_checkpoints import make_text_config, tiny_model_config

MODEL = ModelConfig("toy", 3, 64, 160, 4, 2, 32, 512)


def test_layer_and_head_flops_equal_torchs_counter() -> None:
    shapes = [(64, 256), (128, 64), (64, 320), (160, 64)] * MODEL.num_layers
    positions, scored = 50, 20
    weights = [torch.randn(shape, requires_grad=True) for shape in shapes]
    assert MODEL.num_layer_parameters == sum(weight.numel() for weight in weights)
    head = torch.randn(64, 512, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        for weight in weights:
            (torch.randn(positions, len(weight), requires_grad=True) @ weight).sum().backward()
        (torch.randn(scored, 64, requires_grad=True) @ head).sum().backward()
    attended_pairs = 1000
    attention = 3 * 4 * 128 * 3 * attended_pairs
    assert compute_step_flops(MODEL, positions, attended_pairs, scored) - attention == counter.get_total_flops()


def test_parameters_are_those_of_transformers_model() -> None:
    model = tiny_model_config()
    network = Ministral3ForCausalLM(make_text_config(model, tied=False))
    assert model.num_parameters == sum(parameter.numel() for parameter in network.parameters())


def test_optimizer_state_is_fp32_whatever_the_weights_are() -> None:
    model = tiny_model_config()
    saved = compute_checkpoint_bytes(model, Dtype.fp32) - compute_checkpoint_bytes(model, Dtype.bf16)
    assert abs(saved - 2 * 1.01 * model.num_parameters) <= 2
