"""Count the work of a sequence from its outline and its noise: no token is read, and the counts are exact."""

from typing import NamedTuple

import numpy as np

from data_pipeline.noise import NoiseSource
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.sequence import Outline, count_positions


class SequenceWork(NamedTuple):
    """Counts of one sequence: live_blocks, noisy ones; attended_pairs of useful positions; scored_positions."""

    live_blocks: int
    attended_pairs: int
    scored_positions: int


def count_sequence_work(
    outline: Outline, form: SequenceForm, noise: NoiseSource | None, sample_index: int
) -> SequenceWork:
    """Return what a forward of this sample computes; noise: None in the AR stage."""
    lengths = outline.lengths.astype(np.int64)
    documents = outline.documents if form.isolate_documents else np.zeros_like(outline.documents)
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    tokens = np.add.reduceat(lengths, starts)
    causal = int((tokens * (tokens + 1) // 2).sum())
    is_first = np.zeros(len(lengths), dtype=bool)
    is_first[starts] = True
    clean = int(np.where(outline.is_prompt, 0, lengths).sum() - (is_first & ~outline.is_prompt).sum())
    if noise is None:
        return SequenceWork(0, causal, clean)
    assert form.alignment == form.block_size, "noised segments are whole blocks"
    padded = count_positions(lengths, form.block_size)
    inside = np.where(outline.is_prompt, lengths, padded)  # padding after a prompt belongs to no document
    segment = np.repeat(np.arange(len(lengths)), padded)
    offset = np.arange(len(segment)) - (np.cumsum(padded) - padded)[segment]
    is_scored = ~outline.is_prompt[segment] & (form.block_padding_loss | (offset < lengths[segment]))
    is_masked = np.zeros(len(segment), dtype=bool)
    is_masked[offset < inside[segment]] = np.concatenate(
        [
            noise.mask(sample_index, number, int(count))[0]
            for number, count in zip(documents[starts].tolist(), np.add.reduceat(inside, starts), strict=True)
        ]
    )
    scored = (is_masked & is_scored).reshape(-1, form.block_size).sum(axis=1)
    # A live block is one of a response or a text, so all of its positions are of its document.
    before = np.cumsum(lengths) - lengths
    text_before = before - np.maximum.accumulate(np.where(is_first, before, 0))
    seen = (text_before[segment] + offset)[:: form.block_size] + form.block_size
    attended_pairs = causal + form.block_size * int(seen[scored > 0].sum())
    return SequenceWork(int((scored > 0).sum()), attended_pairs, clean + int(scored.sum()))
