"""Compute attention as one block-sparse kernel: FlexAttention with a BlockMask and grouped key heads (used on CUDA).

FlexAttention has no backward on the CPU (torch 2.13): there it serves checks of the forward only.
Source: torch.nn.attention.flex_attention.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from model.attention.tiles import MASK_BLOCK, choose_kernel_options
from model.attention.visibility import VisibleKeys

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FlexAttention:
    """Attends under one layout; block_mask is torch's BlockMask."""

    block_mask: Any

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Map query [B, H, R, D], key and value [B, G, K, D] to [B, H, R, D]; K = R, or all that a shard sees."""
        kernel = _compiled_kernel() if query.is_cuda else _eager_kernel()
        options = choose_kernel_options(query)
        return kernel(query, key, value, block_mask=self.block_mask, enable_gqa=True, kernel_options=options)


@cache
def _compiled_kernel() -> Callable[..., Tensor]:
    return torch.compile(_eager_kernel(), dynamic=False)


def _eager_kernel() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def build_flex_attention(keys: VisibleKeys) -> FlexAttention:
    """Build the BlockMask of these intervals; one for the whole batch where its sequences are laid out alike."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, num_positions = keys.clean_start.shape
    num_keys, device = keys.num_noisy + keys.num_clean, keys.clean_start.device
    # Compiled, the mask is evaluated blockwise; eagerly it would exist once at full size [positions, keys].
    create = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    shape = (None if batch == 1 else batch, None, num_positions, num_keys)
    return FlexAttention(create(build_mask_mod(keys), *shape, device=str(device), BLOCK_SIZE=MASK_BLOCK))


def build_mask_mod(keys: VisibleKeys) -> MaskMod:
    """Return FlexAttention's mask_mod: comparisons of the key's index with int32 tables read by the query alone.

    Written so, the backward's kernel spills least of the forms compared (compiled for sm_90). Only where documents
    have gaps is a table of the keys read as well.
    """
    noisy_start, noisy_stop = _reader(keys.noisy_start), _reader(keys.noisy_stop)
    clean_start, clean_stop = _reader(keys.clean_start + keys.num_noisy), _reader(keys.clean_stop + keys.num_noisy)

    def sees_clean(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k >= clean_start(b, q)) & (k < clean_stop(b, q))

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k >= noisy_start(b, q)) & (k < noisy_stop(b, q))) | sees_clean(b, h, q, k)

    in_intervals: MaskMod = sees if keys.num_noisy else sees_clean
    if keys.gaps is None:
        return in_intervals
    is_gap = _reader(pad(keys.gaps, (keys.num_noisy, 0)))

    def sees_text(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return in_intervals(b, h, q, k) & ~is_gap(b, k)

    return sees_text


def _reader(table: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return how a kernel reads table [B, n]: by sequence and index; by index alone where B is 1."""
    if len(table) > 1:
        return lambda b, index: table[b, index]
    only = table[0]  # here: as a constant index within the kernel's function, 0 would become a tensor on the device
    return lambda b, index: only[index]
