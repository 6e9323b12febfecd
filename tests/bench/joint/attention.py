"""Ways to compute the joint mask on the CPU, forward and backward of one layer's attention."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from model.attention.grouped import build_grouped_attention
from model.attention.tiled import TiledAttention
from model.attention.visibility import build_regular_layout, compute_dense_mask, find_visible_keys
from tests.bench.joint.cases import BLOCK_SIZE
from tests.bench.joint.reference import DenseAttention
from tests.bench.timing import measure_in_turns

HEADS, GROUPS, HEAD_DIM = 4, 2, 64


def compare_attention(length: int, rounds: int) -> dict[str, Any]:
    """Return the median CPU seconds by way.

    Raises AssertionError where one computes something else than the dense mask.
    """
    layout = build_regular_layout(length, BLOCK_SIZE)
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "dense mask, repeated heads": DenseAttention(compute_dense_mask(layout, True)[:, None]),
        "grouped under masks": build_grouped_attention(find_visible_keys(layout, True)),
        "tiled": TiledAttention(length, BLOCK_SIZE, doubled=True),
    }
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2 * length, 1, heads, HEAD_DIM, generator=generator).permute(1, 2, 0, 3).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    )
    grad = torch.randn(query.shape, generator=generator)

    def both_ways(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(query, key, value), (query, key, value), grad)

    with torch.no_grad():
        expected, *others = (attend(query, key, value) for attend in ways.values())
        for output in others:
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    times = measure_in_turns({name: both_ways(attend) for name, attend in ways.items()}, rounds)
    return {name: median(values) for name, values in times.items()}
