"""Handing tokens to a streamer of transformers while they are decoded."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class TokenStream:
    """What a decode has committed, as transformers' `generate` streams it; does nothing without a streamer.

    The streamer's `put` gets the prompt [1, P] first, then new tokens [n] in their order, int64 on the CPU: put
    together they are `output_ids`, the stop token included. `end` follows the last ones; not after an exception.
    """

    def __init__(self, streamer: BaseStreamer | None, prompt_ids: Tensor):
        """prompt_ids [B, P]. Raises ValueError for several rows: they would be mixed up in one stream."""
        if streamer is not None and len(prompt_ids) != 1:
            raise ValueError(
                f"a streamer takes one prompt at a time, got {len(prompt_ids)}: call it per prompt, or leave it out"
            )
        self._streamer = streamer
        if streamer is not None:
            streamer.put(prompt_ids.cpu())

    def put(self, tokens: Tensor | Sequence[int], stop_ids: tuple[int, ...]) -> None:
        """Stream committed tokens ([1, N], or a list) up to and including the first stop id."""
        if self._streamer is None:
            return  # before anything moves to the host
        values = tokens[0].tolist() if isinstance(tokens, Tensor) else list(tokens)
        self._streamer.put(torch.tensor(cut_at_stop(values, stop_ids), dtype=torch.long))

    def end(self) -> None:
        """Nothing more follows."""
        if self._streamer is not None:
            self._streamer.end()


def cut_at_stop(tokens: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """The tokens up to and including the first stop id."""
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: index + 1]
    return tokens
