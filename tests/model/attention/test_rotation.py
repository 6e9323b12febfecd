"""Rotary embedding and query scaling against transformers' own."""

import pytest
import torch
from transformers import Ministral3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.ministral3 import modeling_ministral3

from conf.schema import RopeConfig
from model.attention.rotation import RotationBuilder, apply_rotation, rotate_heads
from model.hf.rope import compute_query_scale

HEAD_DIM = 64
ROPES = [
    RopeConfig(original_max_position_embeddings=64),
    RopeConfig(original_max_position_embeddings=16384),
    RopeConfig(factor=0.25, original_max_position_embeddings=16384),
    RopeConfig(theta=1e9, truncate=False, original_max_position_embeddings=4096),
    RopeConfig(mscale=0.7, mscale_all_dim=0.3, original_max_position_embeddings=128),
]


def hf_config(rope: RopeConfig) -> Ministral3Config:
    """Return the same embedding in transformers' terms."""
    parameters = {key: value for key, value in vars(rope).items() if key != "theta"}
    parameters |= {"rope_type": "yarn", "rope_theta": rope.theta, "max_position_embeddings": 262144}
    return Ministral3Config(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=HEAD_DIM, rope_parameters=parameters
    )


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_frequencies_equal_transformers(rope: RopeConfig) -> None:
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](hf_config(rope), torch.device("cpu"))
    torch.testing.assert_close(RotationBuilder(rope, HEAD_DIM).inverse_frequencies, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_rotated_heads_equal_transformers_beyond_the_original_length(rope: RopeConfig) -> None:
    positions = torch.arange(0, 3 * rope.original_max_position_embeddings, 97)[None]
    heads = torch.randn(positions.shape[1], 1, 3, HEAD_DIM)
    rotary = modeling_ministral3.Ministral3RotaryEmbedding(hf_config(rope))
    cos, sin = rotary(heads, positions)
    expected, _ = modeling_ministral3.apply_rotary_pos_emb(
        heads.permute(1, 2, 0, 3), heads.permute(1, 2, 0, 3), cos, sin
    )
    actual = apply_rotation(heads, RotationBuilder(rope, HEAD_DIM).build(positions, torch.float32))
    torch.testing.assert_close(actual.permute(1, 2, 0, 3), expected, rtol=1e-5, atol=1e-5)


def test_query_scale_equals_transformers() -> None:
    rope = RopeConfig(original_max_position_embeddings=16)
    positions = torch.arange(100)[None]
    expected = modeling_ministral3.get_llama_4_attn_scale(positions, rope.llama_4_scaling_beta, 16)
    scale = RotationBuilder(rope, HEAD_DIM).build(positions, torch.float32).query_scale
    assert scale is not None
    torch.testing.assert_close(scale[:, 0, 0, 0], expected[0, 0, :, 0])


def test_both_halves_of_a_doubled_sequence_share_positions() -> None:
    rope = RopeConfig(original_max_position_embeddings=16)
    rotation = RotationBuilder(rope, HEAD_DIM).build(torch.arange(40).repeat(2)[None], torch.float32)
    assert rotation.query_scale is not None
    for field in (rotation.cos, rotation.sin, rotation.query_scale):
        assert torch.equal(field[:40], field[40:])
    assert rotation.query_scale[16:40].min() > 1


def test_the_rotations_gradient_is_that_of_its_formula() -> None:
    rope = RopeConfig(original_max_position_embeddings=4)
    positions = torch.arange(12)[None]
    rotation = RotationBuilder(rope, HEAD_DIM).build(positions, torch.float64)
    heads = torch.randn(12, 1, 3, HEAD_DIM, dtype=torch.float64).requires_grad_()
    first, second = heads.chunk(2, dim=-1)
    expected = heads * rotation.cos + torch.cat([second, first], dim=-1) * rotation.sin
    scale = compute_query_scale(positions, beta=rope.llama_4_scaling_beta, original_max_position_embeddings=4)
    expected = expected * scale.T[..., None, None]
    actual = apply_rotation(heads, rotation, scale=True)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(heads)
    mine, its = (torch.autograd.grad(output, heads, grad) for output in (actual, expected))
    torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("scale", [False, True])
def test_what_a_gpu_compiles_is_the_same_rotation_both_ways(scale: bool) -> None:
    rope = RopeConfig(original_max_position_embeddings=16)
    rotation = RotationBuilder(rope, HEAD_DIM).build(torch.arange(40)[None], torch.float64)
    heads = torch.randn(40, 1, 3, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(heads)
    turned = apply_rotation(heads, rotation, scale)
    (back,) = torch.autograd.grad(turned, heads, grad)
    given = rotation.cos, rotation.sin, rotation.query_scale if scale else None
    compiled = torch.compile(rotate_heads, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(heads.detach(), *given, True), turned)
    torch.testing.assert_close(compiled(grad, *given, False), back)
