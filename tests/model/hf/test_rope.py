"""Frequencies and factors equal transformers' to the bit."""

import pytest
import torch
from transformers import Ministral3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.hf.rope import RotaryEmbedding

CASES = [
    {},
    {"factor": 0.25},
    {"rope_theta": 1e9},
    {"truncate": False},
    {"truncate": False, "factor": 0.25},
    {"beta_fast": 64.0, "beta_slow": 2.0},
    {"mscale": 0.7, "mscale_all_dim": 1.0},
    {"mscale": None, "mscale_all_dim": None},
    {"attention_factor": 1.25},
    {"beta_fast": None, "beta_slow": None},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("head_dim", [128, 32])
def test_frequencies_equal_transformers(case, head_dim):
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
        **case,
    }
    config = Ministral3Config(head_dim=head_dim, rope_parameters=dict(rope))
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    ours = RotaryEmbedding(rope, head_dim)
    assert torch.equal(ours.inverse_frequencies, frequencies)
    assert ours.attention_factor == pytest.approx(factor, abs=1e-12)


def test_query_scale_steps_at_multiples_of_the_original_context():
    rope = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 100, "llama_4_scaling_beta": 0.1}
    encode = RotaryEmbedding(rope, 16)
    positions = torch.tensor([[0, 99, 100, 199, 200]])
    scale = encode(positions, torch.float64).query_scale
    assert scale is not None
    expected = 1 + 0.1 * torch.tensor([1, 1, 2, 2, 3], dtype=torch.float64).log()
    torch.testing.assert_close(scale.flatten(), expected, atol=1e-6, rtol=0)
