"""Attention by halves against the dense reference mask in float64: values and gradients, every form it accepts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from conf.schema import AttentionBackend, ModelConfig
from model.attention.blocks import BlockAttention, _BlockAttention, suits
from model.attention.kernels import CPU, CUDA
from model.attention.plan import PlanBuilder, build_regular_layout
from model.attention.split import SplitAttention
from tests.model.attention.test_backends import attend_dense, build_packed_layout, gradients, random_heads

# Halved to the end, ending in three and five segments, one block only, blocks of one and larger than a causal leaf.
FORMS = [(256, 32), (96, 32), (160, 32), (48, 48), (16, 1), (512, 256), (288, 48)]
MODEL = ModelConfig("toy", 1, 64, 96, 4, 2, 16, 384)


class Context(SimpleNamespace):
    """Autograd's, without autograd."""

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        self.saved_tensors = tensors


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize(("length", "block_size"), FORMS)
def test_block_attention_equals_the_dense_mask(length: int, block_size: int, doubled: bool) -> None:
    layout = build_regular_layout(length, block_size, doubled)
    rows = length * (2 if doubled else 1)
    heads = [tensor.detach().double().requires_grad_() for tensor in random_heads(2, rows)]
    expected, actual = attend_dense(layout, heads), BlockAttention(length, block_size, doubled)(*heads)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for mine, its in zip(gradients(actual, heads), gradients(expected, heads), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-11, atol=1e-11)


def test_in_half_precision_pieces_are_merged_in_fp32() -> None:
    layout = build_regular_layout(256, 32, doubled=True)
    heads = [tensor.detach().bfloat16().requires_grad_() for tensor in random_heads(1, 512)]
    exact = [tensor.detach().double().requires_grad_() for tensor in heads]
    actual, expected = BlockAttention(256, 32, doubled=True)(*heads), attend_dense(layout, exact)
    assert actual.dtype is torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=2e-2)
    for mine, its in zip(gradients(actual, heads), gradients(expected, exact), strict=True):
        assert mine.dtype is torch.bfloat16
        assert (mine.double() - its).norm() < 1e-2 * its.norm()


def test_forms_of_many_odd_segments_are_left_to_groups() -> None:
    assert suits(4096, 32)
    assert suits(96, 32)
    assert not suits(63 * 32, 32), "63 calls per half"
    assert not suits(100, 32), "a short last block"


def test_the_plan_chooses_by_layout() -> None:
    builder = PlanBuilder(MODEL, AttentionBackend.auto, torch.float32, torch.device("cpu"))
    assert isinstance(builder.build(build_regular_layout(64, 16, doubled=True)).attend, BlockAttention)
    assert isinstance(builder.build(build_packed_layout([[[64], [32], [64]]])).attend, SplitAttention)


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize(("length", "block_size"), FORMS)
def test_the_cuda_kernel_gets_what_torch_says_it_takes(length: int, block_size: int, doubled: bool) -> None:
    rows = length * (2 if doubled else 1)
    with FakeTensorMode(), torch.no_grad():  # autograd would ask the driver for a device
        query, key, value = (torch.empty(2, n, rows, 64, device="cuda", dtype=torch.bfloat16) for n in (8, 2, 2))
        context = Context()
        attended = _BlockAttention.forward(context, query, key, value, BlockAttention(length, block_size, doubled))
        grads = _BlockAttention.backward(context, torch.empty_like(attended))[:3]
    assert attended.shape == query.shape
    assert [grad is not None and grad.shape for grad in grads] == [query.shape, key.shape, value.shape]


@pytest.mark.parametrize(("length", "block_size"), FORMS)
def test_pieces_that_flash_attention_takes_cover_the_joint_mask(
    monkeypatch: pytest.MonkeyPatch, length: int, block_size: int
) -> None:
    monkeypatch.setattr("model.attention.blocks.find_kernel", lambda _: replace(CPU, largest_leaf=CUDA.largest_leaf))
    layout = build_regular_layout(length, block_size, doubled=True)
    heads = [tensor.detach().double().requires_grad_() for tensor in random_heads(2, 2 * length)]
    expected, actual = attend_dense(layout, heads), BlockAttention(length, block_size, doubled=True)(*heads)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for mine, its in zip(gradients(actual, heads), gradients(expected, heads), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-11, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize(("length", "block_size"), FORMS)
def test_block_attention_on_cuda_equals_the_dense_mask(length: int, block_size: int, doubled: bool) -> None:
    layout = build_regular_layout(length, block_size, doubled)
    heads = [tensor.detach().bfloat16().cuda() for tensor in random_heads(2, length * (2 if doubled else 1))]
    exact = [tensor.cpu().double().requires_grad_() for tensor in heads]
    heads = [tensor.requires_grad_() for tensor in heads]
    expected, actual = attend_dense(layout, exact), BlockAttention(length, block_size, doubled)(*heads)
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=2e-2, atol=2e-2)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = torch.autograd.grad(actual, heads, grad.cuda())
    for mine, its in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert (mine.cpu().double() - its).norm() < 2e-2 * its.norm()
