"""Text of an answer as its tokens are committed."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TextStreamer


class AnswerStreamer(TextStreamer):
    """Writes an answer word by word, so that no part of a character is ever shown; the stop token is not text.

    Other special tokens are: `<think>` belongs to the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop_ids: tuple[int, ...], write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self._stop_ids, self._write = stop_ids, write
        self._shown_ids: list[int] = []

    @property
    def text(self) -> str:
        """All of the answer so far."""
        return str(self.tokenizer.decode(self._shown_ids, **self.decode_kwargs))

    def put(self, value: Tensor) -> None:
        """The prompt [1, P] first, then new tokens [n]."""
        if not self.next_tokens_are_prompt:
            shown = [token for token in value.tolist() if token not in self._stop_ids]
            self._shown_ids += shown
            value = torch.tensor(shown, dtype=torch.long)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Text that later tokens cannot change."""
        if text:
            self._write(text)
