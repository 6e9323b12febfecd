"""Both attention backends against the dense reference mask: every sequence and block length, documents, gradients."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from data_pipeline.batch import SequenceLayout
from data_pipeline.packing.form import SequenceForm
from model.attention.flex import build_flex_attention
from model.attention.grouped import GROUP_SIZE, build_grouped_attention
from model.attention.visibility import build_regular_layout, compute_dense_mask, find_visible_keys
from tests.helpers.packed import pack_chats

HEADS, GROUPS, HEAD_DIM = 4, 2, 16
GRID = [(8, 4), (32, 8), (48, 48), (60, 1), (96, 24), (GROUP_SIZE, 32), (GROUP_SIZE + 32, 32), (288, 48)]
# Lengths of texts [n] and of chats [prompt, response, ...]: whole blocks, then padding, block padding and both.
PACKED = [
    [[[64], [32], [64]], [[160]]],
    [[[16], [128]], [[96], [64]]],
    [[[60], [3], [20]], [[1], [1], [1], [100]]],
    [[[20, 5], [3, 40, 1, 17]], [[30, 33, 16, 2]]],
]


def build_packed_layout(sequences: list[list[list[int]]]) -> SequenceLayout:
    """Lay out chats and texts as the packer does (pack_chats), in blocks of 16."""
    return pack_chats(sequences, SequenceForm(160, 16, 16)).layout


def random_heads(batch: int, num_positions: int) -> list[torch.Tensor]:
    """Draw query, key, value with gradients."""
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, GROUPS, GROUPS)
    return [torch.randn(batch, n, num_positions, HEAD_DIM, generator=generator).requires_grad_() for n in heads]


def attend_dense(layout: SequenceLayout, doubled: bool, heads: list[torch.Tensor]) -> torch.Tensor:
    """Attend in one matmul over all keys, masked."""
    mask = compute_dense_mask(layout, doubled)[:, None]
    return scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)


def gradients(output: torch.Tensor, heads: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the gradients of an arbitrary function of the output by query, key, value."""
    return torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), heads)


def assert_grouped_equals_dense(layout: SequenceLayout, doubled: bool, batch: int) -> None:
    """Compare outputs and gradients."""
    heads = random_heads(batch, layout.sequence_length * (2 if doubled else 1))
    expected = attend_dense(layout, doubled, heads)
    actual = build_grouped_attention(find_visible_keys(layout.without_repeats(), doubled))(*heads)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for mine, its in zip(gradients(actual, heads), gradients(expected, heads), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize(("length", "block_size"), GRID)
def test_grouped_attention_equals_the_dense_mask(length: int, block_size: int, doubled: bool) -> None:
    assert_grouped_equals_dense(build_regular_layout(length, block_size), doubled, batch=2)


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize("sequences", PACKED)
def test_grouped_attention_keeps_packed_documents_apart(sequences: list[list[list[int]]], doubled: bool) -> None:
    assert_grouped_equals_dense(build_packed_layout(sequences), doubled, batch=len(sequences))


def assert_flex_equals_dense(layout: SequenceLayout, doubled: bool, batch: int) -> None:
    """Compare outputs alone: there is no backward on the CPU."""
    heads = [tensor.detach() for tensor in random_heads(batch, layout.sequence_length * (2 if doubled else 1))]
    actual = build_flex_attention(find_visible_keys(layout.without_repeats(), doubled))(*heads)
    torch.testing.assert_close(actual, attend_dense(layout, doubled, heads), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize(("length", "block_size"), GRID)
def test_flex_attention_forward_equals_the_dense_mask(length: int, block_size: int, doubled: bool) -> None:
    assert_flex_equals_dense(build_regular_layout(length, block_size), doubled, batch=2)


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize("sequences", PACKED)
def test_flex_attention_keeps_packed_documents_apart(sequences: list[list[list[int]]], doubled: bool) -> None:
    assert_flex_equals_dense(build_packed_layout(sequences), doubled, batch=len(sequences))


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "block_size"), [(128, 32), (512, 64), (384, 8)])
def test_flex_attention_trains_on_the_gpu(length: int, block_size: int) -> None:
    layout, cuda = build_regular_layout(length, block_size), torch.device("cuda")
    heads = [tensor.detach().cuda().requires_grad_() for tensor in random_heads(2, 2 * length)]
    expected = attend_dense(layout.to(cuda), True, heads)
    actual = build_flex_attention(find_visible_keys(layout, doubled=True).to(cuda))(*heads)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    ones = torch.ones_like(actual)
    for mine, its in zip(
        torch.autograd.grad(actual, heads, ones), torch.autograd.grad(expected, heads, ones), strict=True
    ):
        torch.testing.assert_close(mine, its, rtol=1e-2, atol=1e-2)
