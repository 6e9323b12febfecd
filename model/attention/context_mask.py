"""Who sees whom among the rows of a context-parallel rank, as a function of row numbers (FlexAttention's mask_mod)."""

from collections.abc import Callable

import torch
from torch import Tensor

from model.attention.context import ContextShard
from model.attention.layout import SequenceLayout


def is_seen(
    q_noisy: Tensor, k_noisy: Tensor, q_index: Tensor, k_index: Tensor, q_block: Tensor, k_block: Tensor
) -> Tensor:
    """Whether a query sees a key of its document, by which half, row of it and block each is of."""
    own_block = q_noisy & k_noisy & (q_block == k_block)
    earlier_blocks = q_noisy & ~k_noisy & (k_block < q_block)
    causal = ~q_noisy & ~k_noisy & (q_index >= k_index)
    return own_block | earlier_blocks | causal


def build_shard_mask_mod(layout: SequenceLayout, shard: ContextShard) -> Callable[..., Tensor]:
    """Queries are the shard's rows, keys its noisy rows and the whole sequence's clean ones (model/attention/layout.py
    has the definition)."""
    documents, clean_documents, blocks = layout.document_ids, layout.clean_document_ids, layout.block_ids
    half = layout.sequence_length // shard.size
    num_noisy = half if layout.doubled else 0
    chunk = half // (2 * shard.count_rounds(layout.sequence_length))
    one = len(documents) == 1

    def in_half(row: Tensor) -> Tensor:
        """Number in the sequence of a row of the shard."""
        place = row % half
        turn, place = place // (2 * chunk), place % (2 * chunk)
        early, late = place + shard.rank * chunk, place + (2 * shard.size - 2 - shard.rank) * chunk
        return turn * (2 * shard.size * chunk) + torch.where(place < chunk, early, late)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        sequence = 0 if one else b
        q_noisy, k_noisy = q < num_noisy, k < num_noisy
        q_index, k_index = in_half(q), torch.where(k_noisy, in_half(k), k - num_noisy)
        q_block, k_block = blocks[sequence, q_index], blocks[sequence, k_index]
        q_document = torch.where(q_noisy, documents[sequence, q_index], clean_documents[sequence, q_index])
        k_document = torch.where(k_noisy, documents[sequence, k_index], clean_documents[sequence, k_index])
        return is_seen(q_noisy, k_noisy, q_index, k_index, q_block, k_block) & (q_document == k_document)

    return sees
