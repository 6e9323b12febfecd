"""FLOPs and bytes against counting by other means; tests/distributed/test_checkpoint.py compares real checkpoints."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Ministral3ForCausalLM, PixtralVisionModel
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

from conf.schema import Dtype, ModelConfig, VisionConfig
from model.megatron.vision import build_projector_config, build_tower_config
from pretrain.costs import compute_checkpoint_bytes, count_step_flops
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
    assert sum(count_step_flops(MODEL, positions, attended_pairs, scored)) - attention == counter.get_total_flops()


def test_parameters_are_those_of_transformers_model() -> None:
    model = tiny_model_config()
    network = Ministral3ForCausalLM(make_text_config(model, tied=False))
    assert model.num_parameters == sum(parameter.numel() for parameter in network.parameters())


def test_optimizer_state_is_fp32_whatever_the_weights_are() -> None:
    model = tiny_model_config()
    saved = compute_checkpoint_bytes(model, Dtype.fp32) - compute_checkpoint_bytes(model, Dtype.bf16)
    assert abs(saved - 2 * 1.01 * model.num_parameters) <= 2


def test_flops_of_images_are_those_torch_counts_in_tower_and_projector() -> None:
    vision = VisionConfig(num_layers=3, hidden_size=64, ffn_hidden_size=160, num_attention_heads=2)
    model = replace(MODEL, vision=vision)
    tower_config = build_tower_config(vision)
    tower_config._attn_implementation = "eager"  # torch counts no other attention on a CPU
    tower = PixtralVisionModel(tower_config)
    projector = Mistral3MultiModalProjector(build_projector_config(model, tower_config))
    pixels = torch.randn(1, 3, 84, 112, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        patches = tower(pixels).last_hidden_state
        projector(patches[0], [(84, 112)]).sum().backward()
    assert counter.get_total_flops() == pytest.approx(count_step_flops(model, 0, 0, 0, 48, 48**2).vision, rel=0.01)
