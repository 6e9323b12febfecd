"""The word embedding's gradient against torch's, with and without megatron-core's gradient buffer."""

from typing import Any

import torch
from torch.nn.functional import embedding

from model.megatron.embedding import _Lookup

VOCAB, HIDDEN = 11, 4
TOKENS = torch.tensor([[3, 3, 10], [0, 3, 7]])


def build_weight() -> Any:
    """Build a weight in float64, with a gradient."""
    return torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def expected_gradient(weight: Any, is_here: torch.Tensor | None = None) -> torch.Tensor:
    """Return torch's own gradient of a sum over squares."""
    hidden = embedding(TOKENS, weight)
    hidden = hidden if is_here is None else hidden * is_here[..., None]
    (gradient,) = torch.autograd.grad(hidden.square().sum(), weight)
    return gradient


def test_the_gradient_equals_torchs() -> None:
    weight = build_weight()
    hidden = _Lookup.apply(weight, TOKENS, None)
    assert torch.equal(hidden, embedding(TOKENS, weight))
    hidden.square().sum().backward()
    torch.testing.assert_close(weight.grad, expected_gradient(weight))


def test_the_gradient_is_added_to_the_buffer_where_there_is_one() -> None:
    weight = build_weight()
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(VOCAB, HIDDEN, dtype=torch.float64), False
    _Lookup.apply(weight, TOKENS, None).square().sum().backward()
    torch.testing.assert_close(weight.main_grad, 1 + expected_gradient(weight))
    assert weight.grad_added_to_main_grad


def test_tokens_of_other_ranks_give_zeros_and_no_gradient() -> None:
    weight, is_here = build_weight(), torch.tensor([[True, False, True], [True, True, False]])
    elsewhere = torch.where(is_here, TOKENS, TOKENS - VOCAB)
    hidden = _Lookup.apply(weight, elsewhere, is_here)
    assert not hidden[~is_here].any()
    hidden.square().sum().backward()
    torch.testing.assert_close(weight.grad, expected_gradient(weight, is_here))
