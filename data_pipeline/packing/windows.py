"""Pack a window of neighbouring chats: longest first into the first sequence with room (first-fit decreasing)."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from conf.schema import OverlongChat
from data_pipeline.packing.counts import PackingCounts
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.sequence import count_positions
from data_pipeline.storage.references import REFERENCE, count_tokens_of_images
from data_pipeline.storage.tokens import Shard, open_shard

CHATS_PER_WINDOW = 4096  # the last, half-empty sequence of a window costs 1% where 80 chats fill a sequence
MAX_CACHED_WINDOWS = 1024  # of 20 kB each; packing one takes 6 ms


@dataclass(frozen=True)
class Window:
    """Holds packed chats. chats: int32 document numbers, by sequence. ends: int32, where each sequence ends."""

    chats: np.ndarray
    ends: np.ndarray
    counts: PackingCounts

    def find(self, sequence: int) -> list[int]:
        """Return the chats of sequence number `sequence` of the window."""
        start = int(self.ends[sequence - 1]) if sequence else 0
        return self.chats[start : self.ends[sequence]].tolist()


@lru_cache(maxsize=MAX_CACHED_WINDOWS)
def pack_window(prefix: str, num_tokens: int, first: int, form: SequenceForm) -> Window:
    """Pack chats [first, first + CHATS_PER_WINDOW) of a shard.

    The shard is named, not passed: a cached window must not hold a shard open, and serves one that is opened again.
    """
    shard = open_shard(prefix, num_tokens)
    bounds = shard.segment_bounds(first, min(first + CHATS_PER_WINDOW, shard.num_documents))
    lengths = shard.segment_lengths(bounds[0], bounds[-1]).astype(np.int64)
    chat_starts = bounds[:-1] - bounds[0]
    fitting = fit_chats(lengths, bounds, form)
    tokens, fitting_tokens = np.add.reduceat(lengths, chat_starts), np.add.reduceat(fitting, chat_starts)
    is_used = fitting_tokens > 0
    if form.overlong_chats is OverlongChat.drop:
        is_used &= fitting_tokens == tokens
    positions = np.add.reduceat(count_positions(fitting, form.alignment), chat_starts)
    sequences = _first_fit_decreasing(positions, is_used, form.sequence_length)

    responses = np.where(np.repeat(is_used, np.diff(bounds)), fitting, 0)[1::2]
    block_padding_tokens = int((count_positions(responses, form.alignment) - responses).sum())
    used_tokens = int(fitting_tokens[is_used].sum())
    images = _find_used_images(shard, first, bounds, np.where(np.repeat(is_used, np.diff(bounds)), fitting, 0))
    counts = PackingCounts(
        sequences=len(sequences),
        documents=int(is_used.sum()),
        tokens=used_tokens,
        scored_tokens=int(responses.sum()),
        block_padding_tokens=block_padding_tokens,
        padding_tokens=len(sequences) * form.sequence_length - used_tokens - block_padding_tokens,
        truncated_chats=int((is_used & (fitting_tokens < tokens)).sum()),
        truncated_tokens=int((tokens - fitting_tokens)[is_used].sum()),
        dropped_chats=int((~is_used).sum()),
        dropped_tokens=int(tokens[~is_used].sum()),
        images=len(images),
        image_tokens=int(count_tokens_of_images(images).sum()),
    )
    chats = first + np.array([chat for chats in sequences for chat in chats], dtype=np.int32)
    ends = np.cumsum([len(chats) for chats in sequences], dtype=np.int32)
    return Window(chats, ends, counts)


def _find_used_images(shard: Shard, first: int, bounds: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Return the references of the images of chats from `first` on whose prompts are used.

    bounds: [chats + 1] first segment of each chat. used: [segments] tokens used of each.
    """
    if shard.images is None:
        return np.zeros(0, REFERENCE)
    references = shard.images.read(first, first + len(bounds) - 1)
    per_chat = np.diff(shard.images.bounds(first, first + len(bounds) - 1))
    segment = np.repeat(bounds[:-1] - bounds[0], per_chat) + references["segment"]
    return references[used[segment] > 0]


def fit_chats(lengths: np.ndarray, bounds: np.ndarray, form: SequenceForm) -> np.ndarray:
    """Return the tokens of each segment that fit a sequence which its chat begins; int64.

    lengths: [segments] prompt, response, prompt, ... bounds: [chats + 1] first segment of each chat.
    A chat ends with the last response token that fits; nothing is left of one whose first response does not fit.
    """
    positions = count_positions(lengths, form.alignment)
    before = np.cumsum(positions) - positions
    before_chat = np.repeat(before[bounds[:-1] - bounds[0]], np.diff(bounds))
    room = form.sequence_length - (before - before_chat)
    fitting = np.minimum(lengths.astype(np.int64), np.maximum(room, 0)).reshape(-1, 2)
    fitting[fitting[:, 1] == 0, 0] = 0  # a prompt without its response
    return fitting.ravel()


def _first_fit_decreasing(sizes: np.ndarray, is_used: np.ndarray, capacity: int) -> list[list[int]]:
    """Return the used items in as few bins as first-fit decreasing finds; equal sizes in the order they come."""
    bins: list[list[int]] = []
    room = np.full(len(sizes), capacity)
    for item in np.argsort(-sizes, kind="stable").tolist():
        if is_used[item]:
            place = int((room[: len(bins) + 1] >= sizes[item]).argmax())  # an empty bin has room
            if place == len(bins):
                bins.append([])
            bins[place].append(item)
            room[place] -= sizes[item]
    return bins
