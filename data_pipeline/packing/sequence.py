"""Lay out one training sequence: where the tokens of its segments lie, and what lies between them.

A text is one segment; a chat alternates prompt and response. Every segment starts at a multiple of form.alignment. The
positions left up to the next multiple are padding after a prompt; after a response or a text they are block padding:
tokens that fill its last block as decoding finds it, end-of-turn after end-of-turn.

    position 0       8        16        24       32
             |prompt |prom ....|response|res eee |......   e = block padding, . = padding    (blocks of 8)
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import Batch, SequenceLayout
from data_pipeline.packing.form import SequenceForm


class Outline(NamedTuple):
    """Holds what is known of the N segments of one sequence, in order, without reading a token.

    lengths: [N] tokens of each. documents: [N] number of the document each belongs to, from 0. is_prompt: [N] bool,
    True where nothing is scored.
    """

    lengths: np.ndarray
    documents: np.ndarray
    is_prompt: np.ndarray

    def with_tokens(self, tokens: np.ndarray, images: np.ndarray | None = None) -> "Segments":
        """Return the segments that these tokens make, which lie end to end, with the references of their images."""
        return Segments(tokens, *self, images)


@dataclass(frozen=True)
class Segments:
    """Holds the N segments of one sequence, in order.

    tokens: all of their tokens, end to end. lengths, documents, is_prompt: as in Outline. images: references (see
    storage.references) of the images in the prompts, in order; None for documents without.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray
    is_prompt: np.ndarray
    images: np.ndarray | None = None


def count_positions(lengths: np.ndarray, alignment: int) -> np.ndarray:
    """Return the positions that segments of these lengths take, up to the next multiple of `alignment`; int64."""
    return -(-lengths.astype(np.int64) // alignment) * alignment


def lay_out(segments: Segments, form: SequenceForm, block_padding_token_id: int, sample_index: int = 0) -> Batch:
    """Return the one sequence [1, S] that the segments make; they take at most form.sequence_length positions."""
    # One more segment without tokens, a prompt, stands for the padding at the end.
    lengths = np.append(segments.lengths.astype(np.int64), 0)
    is_prompt = np.append(segments.is_prompt, True)
    documents = segments.documents if form.isolate_documents else np.zeros_like(segments.documents)
    documents = np.append(documents, -1)
    num_positions = count_positions(lengths, form.alignment)
    num_positions[-1] = form.sequence_length - num_positions.sum()
    assert num_positions[-1] >= 0

    segment = np.repeat(np.arange(len(lengths)), num_positions)
    offset = np.arange(form.sequence_length) - (np.cumsum(num_positions) - num_positions)[segment]
    is_token = offset < lengths[segment]
    block_padding = ~is_token & ~is_prompt[segment]
    in_document = is_token | block_padding
    num_blocks = -(-num_positions // form.block_size)
    tokens = np.full(form.sequence_length, block_padding_token_id, dtype=np.int64)
    tokens[is_token] = segments.tokens
    layout = SequenceLayout(
        document_ids=_to_row(np.where(in_document, documents[segment], -1)),
        block_ids=_to_row((np.cumsum(num_blocks) - num_blocks)[segment] + offset // form.block_size),
        position_ids=_to_row(np.where(in_document, _first_positions(lengths, documents)[segment] + offset, 0)),
        block_padding=_to_row(block_padding),
    )
    loss_mask = (is_token & ~is_prompt[segment]) | (block_padding & form.block_padding_loss)
    return Batch(_to_row(tokens), layout, _to_row(loss_mask), torch.tensor([sample_index], dtype=torch.int64))


def _to_row(array: np.ndarray) -> Tensor:
    """Return [S] as a tensor [1, S]."""
    return torch.from_numpy(array)[None]


def _first_positions(lengths: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Return [N] the position id of each segment's first token: the tokens of its document that come before it."""
    before = np.cumsum(lengths) - lengths
    is_first = np.append(True, documents[1:] != documents[:-1])
    return before - np.maximum.accumulate(np.where(is_first, before, 0))
