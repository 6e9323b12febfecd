"""Stand in for FlexAttention where tensors are fake: what it keeps and makes, without its mask.

torch's operator cannot be traced with gradients outside of torch.compile. What its compiled kernels save for the
backward pass is what flash attention saves: queries, keys, values, outputs, and a log-sum-exp per query and head.
Shapes: B batch, H query heads, G key heads, R queries, K keys, D head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StandInAttention:
    """Attends as FlexAttention does, as far as memory and FLOPs are concerned.

    attended_pairs: of queries and keys that see each other, in `num_layouts` sequences; a batch may repeat one layout.
    """

    attended_pairs: int
    num_layouts: int
    add_flops: Callable[[int], None]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Map query [B, H, R, D], key and value [B, G, K, D] to [B, H, R, D]."""
        assert query.dtype == key.dtype == value.dtype, "FlexAttention takes queries, keys and values of one format"
        return _Attend.apply(query, key, value, self)

    def count(self, query: Tensor, matmuls: int) -> None:
        """Count matmuls of the width D over the attended pairs of all heads."""
        batch, heads, _, head_dim = query.shape
        self.add_flops(2 * matmuls * self.attended_pairs * batch // self.num_layouts * heads * head_dim)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, attention: StandInAttention) -> Tensor:
        output = torch.empty_like(query)
        normalisers = torch.empty(query.shape[:-1], device=query.device, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normalisers)
        ctx.attention = attention
        attention.count(query, 2)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, _, normalisers = ctx.saved_tensors
        delta = torch.empty_like(normalisers)  # of the gradient and the output, by query
        ctx.attention.count(query, 4)  # useful ones: the kernel computes the scores once more
        del delta
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
