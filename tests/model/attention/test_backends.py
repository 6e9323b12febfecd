"""Both attention backends against the dense reference mask: every sequence and block length, documents, gradients."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from data_pipeline.packing.form import SequenceForm
from model.attention.flex import build_flex_attention
from model.attention.layout import SequenceLayout, compute_dense_mask, count_seen_rows
from model.attention.plan import build_regular_layout
from model.attention.split import ROWS_PER_GROUP, build_split_attention
from tests.helpers.packed import pack_chats

HEADS, GROUPS, HEAD_DIM = 4, 2, 16
GRID = [(8, 4), (32, 8), (48, 48), (60, 1), (96, 24), (ROWS_PER_GROUP, 32), (ROWS_PER_GROUP + 32, 32), (288, 48)]
# Lengths of texts [n] and of chats [context, answer, ...]: whole blocks, then padding, block padding and both.
PACKED = [
    [[[64], [32], [64]], [[160]]],
    [[[16], [128]], [[96], [64]]],
    [[[60], [3], [20]], [[1], [1], [1], [100]]],
    [[[20, 5], [3, 40, 1, 17]], [[30, 33, 16, 2]]],
]


def build_packed_layout(sequences: list[list[list[int]]], doubled: bool = True) -> SequenceLayout:
    """As the packer lays out chats and texts (pack_chats), in blocks of 16."""
    batch = pack_chats(sequences, SequenceForm(160, 16, 16))
    return SequenceLayout(batch.document_ids, batch.block_ids, batch.position_ids, batch.block_padding, doubled)


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


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize("sequences", PACKED)
def test_split_attention_keeps_packed_documents_apart(sequences: list[list[list[int]]], doubled: bool) -> None:
    assert_split_equals_dense(build_packed_layout(sequences, doubled), batch=len(sequences))


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize(("length", "block_size"), GRID)
def test_flex_attention_forward_equals_the_dense_mask(length: int, block_size: int, doubled: bool) -> None:
    layout = build_regular_layout(length, block_size, doubled)
    rows = length * (2 if doubled else 1)
    heads = [tensor.detach() for tensor in random_heads(2, rows)]
    torch.testing.assert_close(build_flex_attention(layout)(*heads), attend_dense(layout, heads), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize("sequences", PACKED)
def test_flex_attention_keeps_packed_documents_apart(sequences: list[list[list[int]]], doubled: bool) -> None:
    layout = build_packed_layout(sequences, doubled)
    heads = [tensor.detach() for tensor in random_heads(2, layout.row_positions().shape[1])]
    torch.testing.assert_close(build_flex_attention(layout)(*heads), attend_dense(layout, heads), rtol=1e-5, atol=1e-5)


def test_the_dense_mask_is_the_definition() -> None:
    mask = compute_dense_mask(build_regular_layout(4, 2, doubled=True))[0]
    noisy = [[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0]]
    clean = [[0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert mask.int().tolist() == noisy + clean


def test_block_padding_is_seen_by_their_noisy_block_alone() -> None:
    layout = build_packed_layout([[[3, 20, 5, 20]]])
    mask = compute_dense_mask(layout)[0]
    block_padding = torch.cat([layout.block_padding, layout.block_padding], dim=1)[0].nonzero().flatten()
    noisy, clean = block_padding[block_padding < 160], block_padding[block_padding >= 160]
    assert len(noisy) == len(clean) == 24
    text = (layout.clean_document_ids[0] >= 0).nonzero().flatten()
    assert not mask[text + 160][:, block_padding].any(), "no clean text sees block padding"
    assert not mask[text][:, clean].any(), "no noisy text sees a clean block padding"
    for row in text.tolist():
        same_block = layout.block_ids[0][noisy] == layout.block_ids[0, row]
        assert torch.equal(mask[row, noisy], same_block)


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize("sequences", PACKED)
def test_seen_rows_are_the_sums_of_the_dense_mask(sequences: list[list[list[int]]], doubled: bool) -> None:
    layout = build_packed_layout(sequences, doubled)
    halves = [layout.document_ids, layout.clean_document_ids] if doubled else [layout.clean_document_ids]
    counted = compute_dense_mask(layout).sum(dim=2) * (torch.cat(halves, dim=1) >= 0)
    assert torch.equal(count_seen_rows(layout), counted)


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
