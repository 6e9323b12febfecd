"""Chunked cross entropy against torch's own on the full logits, values and gradients."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from model.megatron import head
from model.megatron.head import score_rows

NUM_SCORED, HIDDEN, VOCAB = 37, 16, 101


@pytest.fixture(scope="module")
def group() -> Any:
    """Return a group of one rank, without a process group of the whole process."""
    store = dist.HashStore()
    return dist.ProcessGroupGloo(store, 0, 1, timedelta(seconds=30))


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw hidden, weight, targets and weights of positions, some of them zero."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_SCORED, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (NUM_SCORED,), generator=generator)
    weights = torch.rand(NUM_SCORED, generator=generator) * (torch.arange(NUM_SCORED) % 5 > 0)
    return hidden, weight, targets, weights


@pytest.mark.parametrize("loss_chunk_rows", [1, 8, NUM_SCORED, 1000])
def test_loss_and_gradients_equal_the_full_logits(group: Any, loss_chunk_rows: int) -> None:
    hidden, weight, targets, weights = inputs(torch.float32)
    loss, losses = score_rows(hidden, weight, targets, weights, loss_chunk_rows, group)
    (3 * loss).backward()
    reference = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = cross_entropy(reference[0] @ reference[1].t(), targets, reduction="none")
    (3 * (expected * weights).sum()).backward()
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.double(), (expected * weights).sum().detach(), rtol=1e-5, atol=1e-5)
    for mine, its in zip((hidden, weight), reference, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.double(), its.grad, rtol=1e-4, atol=1e-5)


def test_huge_logits_do_not_overflow(group: Any) -> None:
    hidden, weight, targets, weights = inputs(torch.float32)
    loss, _ = score_rows(hidden * 1e3, weight, targets, weights, 8, group)
    assert loss.isfinite()


def test_without_scored_positions_the_loss_is_zero_and_so_is_the_gradient(group: Any) -> None:
    hidden, weight, targets, weights = (tensor[:0] for tensor in inputs(torch.float32))
    weight = torch.randn(VOCAB, HIDDEN).requires_grad_()
    hidden = hidden.detach().requires_grad_()
    loss, losses = score_rows(hidden, weight, targets, weights, 8, group)
    loss.backward()
    assert loss == 0
    assert losses.numel() == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_evaluation_forms_no_gradients(group: Any) -> None:
    hidden, weight, targets, weights = inputs(torch.float32)
    buffered: Any = weight
    buffered.main_grad, buffered.grad_added_to_main_grad = torch.zeros_like(weight), False
    with torch.no_grad():
        loss, _ = score_rows(hidden, weight, targets, weights, 8, group)
    assert not loss.requires_grad
    assert not buffered.main_grad.any()


@pytest.mark.parametrize("columns", [8, 50, 101])
def test_in_float64_values_and_gradients_are_exact_in_tiles_of_any_width(
    group: Any, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "TILE_COLUMNS", columns)
    hidden, weight, targets, weights = inputs(torch.float64)
    loss, losses = score_rows(hidden, weight, targets, weights.double(), 8, group)
    loss.backward()
    mine = hidden.grad, weight.grad
    expected = cross_entropy(hidden @ weight.t(), targets, reduction="none")
    its = torch.autograd.grad((expected * weights).sum(), (hidden, weight))
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-12)


def test_the_weights_gradient_goes_into_the_buffer_where_there_is_one(group: Any) -> None:
    hidden, weight, targets, weights = inputs(torch.float32)
    buffered: Any = weight.detach().clone().requires_grad_()
    buffered.main_grad, buffered.grad_added_to_main_grad = torch.ones_like(weight), False
    for one in (weight, buffered):
        loss, _ = score_rows(hidden, one, targets, weights, 8, group)
        loss.backward()
    assert buffered.grad_added_to_main_grad
    assert weight.grad is not None
    torch.testing.assert_close(buffered.main_grad, 1 + weight.grad)


def test_a_scaled_loss_is_refused_where_the_gradient_was_added_already(group: Any) -> None:
    hidden, weight, targets, weights = inputs(torch.float32)
    buffered: Any = weight.detach().clone().requires_grad_()
    buffered.main_grad, buffered.grad_added_to_main_grad = torch.zeros_like(weight), False
    loss, _ = score_rows(hidden, buffered, targets, weights, 8, group)
    with pytest.raises(RuntimeError, match="unscaled"):
        (2 * loss).backward()
