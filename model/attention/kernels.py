"""torch's fused attention kernels behind one form, per device: softmaxes over pieces of a row's keys, with the
log-sum-exp that merges them (blocks.py).

Shapes: N sequences, n query heads that share one key head, Q query rows, K keys, D head_dim.
CPU: every float format; keys have to come once per query head, which costs no memory (stride 0).
CUDA: FlashAttention-2 in half precision, head_dim a multiple of 8; shares key heads by itself; takes the log-sum-exp
contiguous and fp32. It hands out a random state even where nothing is dropped, and its backward wants one.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
HALF_PRECISION = (torch.bfloat16, torch.float16)
MOST_SEQUENCES = 65535  # of one CUDA call: they are a dimension of its grid

State = tuple[Any, ...]  # what the backward of a call needs of its forward besides its results


@dataclass(frozen=True)
class Kernel:
    """attend: query [N, n, Q, D], key and value [N, 1, K, D], causal -> (output as query, log-sum-exp [N, n, Q], state)

    differentiate: (gradient of the output, query, key, value, output, log-sum-exp, state, causal) -> gradients of
    query [N, n, Q, D], of key and value [N, n or 1, K, D] (n: to be summed). Output and log-sum-exp may be those of a
    softmax over more keys than these; then the gradients are these keys' share.
    largest_leaf: clean rows that one causal call computes well.
    """

    attend: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor, State]]
    differentiate: Callable[..., tuple[Tensor, Tensor, Tensor]]
    largest_leaf: int


def find_kernel(device: torch.device) -> Kernel:
    """That of a kind of device."""
    return CUDA if device.type == "cuda" else CPU


def _attend_on_cpu(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor, State]:
    key, value = _expand(key, query), _expand(value, query)
    return *aten._scaled_dot_product_flash_attention_for_cpu.default(query, key, value, 0.0, causal), ()


def _differentiate_on_cpu(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, _: State, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    keys = _expand(key, query), _expand(value, query)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward.default(grad, query, *keys, out, lse, 0.0, causal)


def _expand(keys: Tensor, query: Tensor) -> Tensor:
    return keys.expand(-1, query.shape[1], -1, -1)


def _attend_on_cuda(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor, State]:
    assert query.dtype in HALF_PRECISION, f"FlashAttention computes in half precision, not in {query.dtype}"
    assert len(query) <= MOST_SEQUENCES, f"{len(query)} sequences in one call"
    results = aten._scaled_dot_product_flash_attention.default(query, key, value, 0.0, causal)
    return results[0], results[1][..., : query.shape[2]], tuple(results[2:8])


def _differentiate_on_cuda(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, state: State, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    *lengths, seed, offset = state  # cumulative lengths are None: all sequences are of one length
    return aten._scaled_dot_product_flash_attention_backward.default(
        grad, query, key, value, out, lse.contiguous(), *lengths, 0.0, causal, seed, offset
    )


# On the CPU fewer rows waste less on masked pairs (leaves of 32 against 128: 4 % of the time at L 512, 1 % at L 2048);
# FlashAttention skips masked tiles.
CPU = Kernel(_attend_on_cpu, _differentiate_on_cpu, largest_leaf=32)
CUDA = Kernel(_attend_on_cuda, _differentiate_on_cuda, largest_leaf=sys.maxsize)
