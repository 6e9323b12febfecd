"""A forward's input for one context-parallel rank: its rows of every sequence and what of them is scored."""

import torch
from torch import Tensor

from model.attention.context import ContextShard
from pretrain.objective.rows import ForwardInput, RowSelection


def take_local_rows(item: ForwardInput, shard: ContextShard) -> tuple[Tensor, RowSelection]:
    """tokens [B, R / size] and the scored ones among their rows, numbered there."""
    if shard.size == 1:
        return item.tokens, item.selection
    rows = shard.rows(item.layout.sequence_length, item.layout.doubled)
    return item.tokens[:, rows], _select(item.selection, rows, *item.tokens.shape)


def _select(selection: RowSelection, rows: Tensor, batch_size: int, num_rows: int) -> RowSelection:
    local = torch.full((num_rows,), -1)
    local[rows] = torch.arange(len(rows))
    row, sequence = local[selection.rows // batch_size], selection.rows % batch_size
    here = row >= 0
    return RowSelection(
        (row * batch_size + sequence)[here],
        selection.targets[here],
        selection.is_noisy[here],
        selection.inverse_p[here],
    )
