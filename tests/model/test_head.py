"""Chunked cross entropy against torch's own on the full logits, values and gradients."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from model.head import ChunkedCrossEntropy

ROWS, HIDDEN, VOCAB = 37, 16, 101


@pytest.fixture(scope="module")
def group() -> Any:
    """A group of one rank, without a process group of the whole process."""
    store = dist.HashStore()
    return dist.ProcessGroupGloo(store, 0, 1, timedelta(seconds=30))


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, weight, targets, row weights (some rows weigh nothing)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    weights = torch.rand(ROWS, generator=generator) * (torch.arange(ROWS) % 5 > 0)
    return hidden, weight, targets, weights


@pytest.mark.parametrize("chunk_rows", [1, 8, ROWS, 1000])
def test_loss_and_gradients_equal_the_full_logits(group: Any, chunk_rows: int) -> None:
    hidden, weight, targets, weights = inputs(torch.float32)
    loss, losses = ChunkedCrossEntropy.apply(hidden, weight, targets, weights, chunk_rows, group)
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
    loss, _ = ChunkedCrossEntropy.apply(hidden * 1e3, weight, targets, weights, 8, group)
    assert loss.isfinite()


def test_without_scored_rows_the_loss_is_zero_and_so_is_the_gradient(group: Any) -> None:
    hidden, weight, targets, weights = (tensor[:0] for tensor in inputs(torch.float32))
    weight = torch.randn(VOCAB, HIDDEN).requires_grad_()
    hidden = hidden.detach().requires_grad_()
    loss, losses = ChunkedCrossEntropy.apply(hidden, weight, targets, weights, 8, group)
    loss.backward()
    assert loss == 0
    assert losses.numel() == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_evaluation_forms_no_gradients(group: Any) -> None:
    hidden, weight, targets, weights = inputs(torch.float32)
    with torch.no_grad():
        loss, _ = ChunkedCrossEntropy.apply(hidden, weight, targets, weights, 8, group)
    assert not loss.requires_grad
