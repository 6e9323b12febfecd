"""The norm's precision; attention is covered by the model's tests."""

import torch
from transformers.models.ministral3.modeling_ministral3 import Ministral3RMSNorm

from model.hf.layers import NemotronLabsDiffusionRMSNorm


def make_norms(dtype):
    ours, theirs = NemotronLabsDiffusionRMSNorm(48, 1e-5).to(dtype), Ministral3RMSNorm(48, 1e-5).to(dtype)
    ours.weight.data.uniform_(0.5, 1.5)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_bfloat16_norm_equals_transformers():
    ours, theirs = make_norms(torch.bfloat16)
    hidden = torch.randn(200, 48, dtype=torch.bfloat16) * 10
    assert (ours(hidden) == theirs(hidden)).float().mean() > 0.999


def test_float64_norm_is_computed_in_float64():
    norm, _ = make_norms(torch.float64)
    hidden = torch.randn(5, 48, dtype=torch.float64)
    expected = norm.weight * hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(hidden), expected, atol=1e-14, rtol=0)
