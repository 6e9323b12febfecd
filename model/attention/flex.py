"""Attention as one block-sparse kernel: FlexAttention with a BlockMask and grouped key heads (the way on CUDA).

FlexAttention has no backward on the CPU (torch 2.13): there this backend serves checks of the forward only.
Source: torch.nn.attention.flex_attention.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from model.attention.context import WHOLE, ContextShard
from model.attention.context_mask import build_shard_mask_mod, is_seen
from model.attention.layout import SequenceLayout


@dataclass(frozen=True)
class FlexAttention:
    """Callable form of a layout; block_mask is torch's BlockMask."""

    block_mask: Any

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, H, R, D], key and value [B, G, K, D] -> [B, H, R, D]; K = R, or all that a context shard sees."""
        kernel = _compiled_kernel() if query.is_cuda else _eager_kernel()
        return kernel(query, key, value, block_mask=self.block_mask, enable_gqa=True)


@cache
def _compiled_kernel() -> Callable[..., Tensor]:
    return torch.compile(_eager_kernel(), dynamic=False)


def _eager_kernel() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def build_flex_attention(layout: SequenceLayout, shard: ContextShard = WHOLE) -> FlexAttention:
    """The layout's BlockMask; one for the whole batch where all sequences are laid out alike."""
    from torch.nn.attention.flex_attention import create_block_mask

    layout = layout.without_repeats()
    batch, length = layout.position_ids.shape
    noisy = length // shard.size if layout.doubled else 0
    rows, keys = noisy + length // shard.size, noisy + length
    shared = None if batch == 1 else batch
    device = layout.position_ids.device
    # Compiled, the mask is evaluated blockwise; eagerly it would exist once at full size [rows, rows].
    create = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    return FlexAttention(create(_build_mask_mod(layout, shard), shared, None, rows, keys, device=str(device)))


def _build_mask_mod(layout: SequenceLayout, shard: ContextShard) -> Callable[..., Tensor]:
    if shard.size > 1:
        return build_shard_mask_mod(layout, shard)
    return _doubled_mask_mod(layout) if layout.doubled else _causal_mask_mod(layout)


def _causal_mask_mod(layout: SequenceLayout) -> Callable[..., Tensor]:
    documents = layout.clean_document_ids
    one = len(documents) == 1

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        sequence = 0 if one else b
        return (q >= k) & (documents[sequence, q] == documents[sequence, k])

    return sees


def _doubled_mask_mod(layout: SequenceLayout) -> Callable[..., Tensor]:
    documents = torch.cat([layout.document_ids, layout.clean_document_ids], dim=1)
    blocks, length = layout.block_ids, layout.sequence_length
    one = len(documents) == 1

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        sequence = 0 if one else b
        q_noisy, k_noisy = q < length, k < length
        q_index, k_index = q % length, k % length
        q_block, k_block = blocks[sequence, q_index], blocks[sequence, k_index]
        in_document = documents[sequence, q] == documents[sequence, k]
        return is_seen(q_noisy, k_noisy, q_index, k_index, q_block, k_block) & in_document

    return sees
