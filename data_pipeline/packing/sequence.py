"""Lay out one training sequence: where the tokens of its segments lie and what lies between them.

A text is one segment; a chat alternates prompt and response. Every segment starts at a multiple of form.alignment. The
positions left up to the next multiple are padding after a prompt; after a response or a text they are block padding:
tokens that fill its last block as decoding finds it, end-of-turn after end-of-turn.

    position 0       8        16        24       32
             |prompt |prom ....|response|res eee |......   e = block padding, . = padding    (blocks of 8)
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from data_pipeline.batch import Batch
from data_pipeline.packing.form import SequenceForm


@dataclass(frozen=True)
class Segments:
    """N segments of one sequence, in row order.

    tokens: all of their tokens, end to end. lengths: [N] tokens of each. documents: [N] number of the document each
    belongs to, from 0. is_context: [N] bool, True where nothing is scored.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray
    is_context: np.ndarray


@dataclass(frozen=True)
class Rows:
    """The arrays [S] of a Batch's row, int64 and bool, under the same names."""

    tokens: np.ndarray
    document_ids: np.ndarray
    block_ids: np.ndarray
    position_ids: np.ndarray
    loss_mask: np.ndarray
    block_padding: np.ndarray


def count_rows(lengths: np.ndarray, alignment: int) -> np.ndarray:
    """Rows that segments of these lengths take, up to the next multiple of `alignment`; int64."""
    return -(-lengths.astype(np.int64) // alignment) * alignment


def lay_out(segments: Segments, form: SequenceForm, block_padding_token_id: int) -> Rows:
    """Segments as rows; they take at most form.sequence_length of them."""
    # One more segment without tokens, a context, stands for the padding at the end.
    lengths = np.append(segments.lengths.astype(np.int64), 0)
    is_context = np.append(segments.is_context, True)
    documents = segments.documents if form.isolate_documents else np.zeros_like(segments.documents)
    documents = np.append(documents, -1)
    num_rows = count_rows(lengths, form.alignment)
    num_rows[-1] = form.sequence_length - num_rows.sum()
    assert num_rows[-1] >= 0

    segment = np.repeat(np.arange(len(lengths)), num_rows)
    offset = np.arange(form.sequence_length) - (np.cumsum(num_rows) - num_rows)[segment]
    is_token = offset < lengths[segment]
    block_padding = ~is_token & ~is_context[segment]
    has_place = is_token | block_padding
    num_blocks = -(-num_rows // form.block_size)
    tokens = np.full(form.sequence_length, block_padding_token_id, dtype=np.int64)
    tokens[is_token] = segments.tokens
    return Rows(
        tokens=tokens,
        document_ids=np.where(has_place, documents[segment], -1),
        block_ids=(np.cumsum(num_blocks) - num_blocks)[segment] + offset // form.block_size,
        position_ids=np.where(has_place, _first_positions(lengths, documents)[segment] + offset, 0),
        loss_mask=(is_token & ~is_context[segment]) | (block_padding & form.block_padding_loss),
        block_padding=block_padding,
    )


def stack_rows(rows: list[Rows], sample_indices: list[int]) -> Batch:
    """Batch [B, S] of B laid-out sequences."""
    arrays = {item.name: np.stack([getattr(row, item.name) for row in rows]) for item in fields(Rows)}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(**tensors, sample_indices=torch.tensor(sample_indices, dtype=torch.int64))


def _first_positions(lengths: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """[N] position of each segment's first token: the tokens of its document that come before it."""
    before = np.cumsum(lengths) - lengths
    is_first = np.append(True, documents[1:] != documents[:-1])
    return before - np.maximum.accumulate(np.where(is_first, before, 0))
