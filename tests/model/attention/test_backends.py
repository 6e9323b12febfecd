"""Both attention backends against the dense reference mask: every sequence and block length, documents, gradients."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from model.attention.flex import build_flex_attention
from model.attention.layout import SequenceLayout, compute_dense_mask
from model.attention.plan import build_regular_layout
from model.attention.split import ROWS_PER_GROUP, build_split_attention

HEADS, GROUPS, HEAD_DIM = 4, 2, 16
GRID = [(8, 4), (32, 8), (48, 48), (60, 1), (96, 24), (ROWS_PER_GROUP, 32), (ROWS_PER_GROUP + 32, 32), (288, 48)]
DOCUMENT_LENGTHS = [[64, 32, 64], [160]], [[16, 144], [96, 64]]


def build_packed_layout(document_lengths: list[list[int]], block_size: int, filler: int) -> SequenceLayout:
    """One sequence per list: documents back to back in blocks of their own, `filler` rows of no document at the end."""
    fields = []
    for lengths in document_lengths:
        positions = torch.cat([torch.arange(length) for length in [*lengths, filler]])
        documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((filler,), -1)])
        starts = positions % block_size == 0
        fields.append((documents, starts.cumsum(0) - 1, positions))
    documents, blocks, positions = (torch.stack(list(field)) for field in zip(*fields, strict=True))
    return SequenceLayout(documents, blocks, positions, doubled=True)


def random_heads(batch: int, rows: int) -> list[torch.Tensor]:
    """query, key, value with gradients."""
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, GROUPS, GROUPS)
    return [torch.randn(batch, n, rows, HEAD_DIM, generator=generator).requires_grad_() for n in heads]


def attend_dense(layout: SequenceLayout, heads: list[torch.Tensor]) -> torch.Tensor:
    """The definition: one product over all pairs, masked."""
    return scaled_dot_product_attention(*heads, attn_mask=compute_dense_mask(layout)[:, None], enable_gqa=True)


def gradients(output: torch.Tensor, heads: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Of an arbitrary function of the output by query, key, value."""
    return torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), heads)


def assert_split_equals_dense(layout: SequenceLayout, batch: int) -> None:
    """Outputs and gradients."""
    rows = layout.sequence_length * (2 if layout.doubled else 1)
    heads = random_heads(batch, rows)
    expected, actual = attend_dense(layout, heads), build_split_attention(layout)(*heads)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for mine, its in zip(gradients(actual, heads), gradients(expected, heads), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize(("length", "block_size"), GRID)
def test_split_attention_equals_the_dense_mask(length: int, block_size: int, doubled: bool) -> None:
    assert_split_equals_dense(build_regular_layout(length, block_size, doubled), batch=2)


@pytest.mark.parametrize("lengths", DOCUMENT_LENGTHS)
@pytest.mark.parametrize("filler", [0, 16])
def test_split_attention_keeps_packed_documents_apart(lengths: list[list[int]], filler: int) -> None:
    assert_split_equals_dense(build_packed_layout(lengths, 16, filler), batch=len(lengths))


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize(("length", "block_size"), GRID)
def test_flex_attention_forward_equals_the_dense_mask(length: int, block_size: int, doubled: bool) -> None:
    layout = build_regular_layout(length, block_size, doubled)
    rows = length * (2 if doubled else 1)
    heads = [tensor.detach() for tensor in random_heads(2, rows)]
    torch.testing.assert_close(build_flex_attention(layout)(*heads), attend_dense(layout, heads), rtol=1e-5, atol=1e-5)


def test_flex_attention_keeps_packed_documents_apart() -> None:
    layout = build_packed_layout([[64, 32, 64], [16, 144, 0]], 16, 16)
    heads = [tensor.detach() for tensor in random_heads(2, 2 * layout.sequence_length)]
    torch.testing.assert_close(build_flex_attention(layout)(*heads), attend_dense(layout, heads), rtol=1e-5, atol=1e-5)


def test_the_dense_mask_is_the_definition() -> None:
    mask = compute_dense_mask(build_regular_layout(4, 2, doubled=True))[0]
    noisy = [[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0]]
    clean = [[0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert mask.int().tolist() == noisy + clean


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "block_size"), [(128, 32), (512, 64), (384, 8)])
def test_flex_attention_trains_on_the_gpu(length: int, block_size: int) -> None:
    layout = build_regular_layout(length, block_size, doubled=True)
    heads = [tensor.detach().cuda().requires_grad_() for tensor in random_heads(2, 2 * length)]
    expected = attend_dense(layout.to(torch.device("cuda")), heads)
    actual = build_flex_attention(layout.to(torch.device("cuda")))(*heads)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    ones = torch.ones_like(actual)
    for mine, its in zip(
        torch.autograd.grad(actual, heads, ones), torch.autograd.grad(expected, heads, ones), strict=True
    ):
        torch.testing.assert_close(mine, its, rtol=1e-2, atol=1e-2)
