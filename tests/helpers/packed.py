"""Packed batches of chats with everything the packer can produce: contexts, answers, padding, block padding."""

import numpy as np

from data_pipeline.batch import Batch
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.sequence import Segments, lay_out, stack_rows

BLOCK_PADDING_TOKEN = 2


def pack_chats(sequences: list[list[list[int]]], form: SequenceForm, vocab_size: int = 90, seed: int = 0) -> Batch:
    """One sequence per list of chats; a chat is the lengths of its segments: [context, answer, ...], or [text]."""
    generator = np.random.default_rng(seed)
    rows = []
    for chats in sequences:
        lengths = np.array([length for chat in chats for length in chat])
        documents = np.array([number for number, chat in enumerate(chats) for _ in chat])
        is_context = np.array([len(chat) > 1 and i % 2 == 0 for chat in chats for i in range(len(chat))])
        tokens = generator.integers(3, vocab_size, lengths.sum())
        rows.append(lay_out(Segments(tokens, lengths, documents, is_context), form, BLOCK_PADDING_TOKEN))
    return stack_rows(rows, list(range(len(rows))))
