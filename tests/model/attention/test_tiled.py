"""Tiled attention against the dense reference mask in float64: values and gradients, every form it accepts."""

import pytest
import torch

from conf.schema import AttentionBackend, ModelConfig
from model.attention.grouped import GroupedAttention
from model.attention.plan import PlanBuilder
from model.attention.tiled import TiledAttention, fits_tiles
from model.attention.visibility import build_regular_layout
from tests.model.attention.test_backends import attend_dense, build_packed_layout, gradients, random_heads

# Halved to the end, ending in three and five segments, one block only, blocks of one and larger than a causal tile.
FORMS = [(256, 32), (96, 32), (160, 32), (48, 48), (16, 1), (512, 256), (288, 48)]
MODEL = ModelConfig("toy", 1, 64, 96, 4, 2, 16, 384)


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize(("length", "block_size"), FORMS)
def test_tiled_attention_equals_the_dense_mask(length: int, block_size: int, doubled: bool) -> None:
    layout = build_regular_layout(length, block_size)
    heads = [tensor.detach().double().requires_grad_() for tensor in random_heads(2, length * (2 if doubled else 1))]
    expected, actual = attend_dense(layout, doubled, heads), TiledAttention(length, block_size, doubled)(*heads)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for mine, its in zip(gradients(actual, heads), gradients(expected, heads), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-11, atol=1e-11)


def test_in_half_precision_tiles_are_merged_in_fp32() -> None:
    layout = build_regular_layout(256, 32)
    heads = [tensor.detach().bfloat16().requires_grad_() for tensor in random_heads(1, 512)]
    exact = [tensor.detach().double().requires_grad_() for tensor in heads]
    actual, expected = TiledAttention(256, 32, doubled=True)(*heads), attend_dense(layout, True, exact)
    assert actual.dtype is torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=2e-2)
    for mine, its in zip(gradients(actual, heads), gradients(expected, exact), strict=True):
        assert mine.dtype is torch.bfloat16
        assert (mine.double() - its).norm() < 1e-2 * its.norm()


def test_forms_of_many_odd_segments_are_left_to_groups() -> None:
    assert fits_tiles(4096, 32)
    assert fits_tiles(96, 32)
    assert not fits_tiles(63 * 32, 32), "63 calls per half"
    assert not fits_tiles(100, 32), "a short last block"


def test_the_plan_chooses_by_layout() -> None:
    builder = PlanBuilder(MODEL, AttentionBackend.auto, torch.float32, torch.device("cpu"))
    assert isinstance(builder.build(build_regular_layout(64, 16), True).attend, TiledAttention)
    assert isinstance(builder.build(build_packed_layout([[[64], [32], [64]]]), True).attend, GroupedAttention)
