"""Packed batches of chats with everything the packer can produce: prompts, responses, padding, block padding."""

import numpy as np

from data_pipeline.batch import Batch, stack_batches
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.sequence import Segments, lay_out

BLOCK_PADDING_TOKEN = 2


def pack_chats(sequences: list[list[list[int]]], form: SequenceForm, vocab_size: int = 90, seed: int = 0) -> Batch:
    """Pack one sequence per list of chats; a chat is its segments' lengths: [prompt, response, ...], or [text]."""
    generator = np.random.default_rng(seed)
    laid_out = []
    for chats in sequences:
        lengths = np.array([length for chat in chats for length in chat])
        documents = np.array([number for number, chat in enumerate(chats) for _ in chat])
        is_prompt = np.array([len(chat) > 1 and i % 2 == 0 for chat in chats for i in range(len(chat))])
        tokens = generator.integers(3, vocab_size, lengths.sum())
        segments = Segments(tokens, lengths, documents, is_prompt)
        laid_out.append(lay_out(segments, form, BLOCK_PADDING_TOKEN, sample_index=len(laid_out)))
    return stack_batches(laid_out)
