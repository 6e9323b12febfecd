"""Ends a response at stop strings, since the shipped decode loops only know stop tokens."""

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

BYTES_PER_CHARACTER = 4  # at most; every token but a special one has at least one byte
Decode = Callable[[list[int]], str]


class StopStringError(Exception):
    """Raised inside a decode to end it, because a stop string has been written."""


class StopStrings:
    """Finds where stop strings end a response. They do not end a thought, if the response may begin with one."""

    def __init__(self, decode: Decode, strings: Sequence[str], think_end_id: int | None = None):
        """Store the strings.

        Args:
            decode: spells tokens.
            strings: empty ones are ignored.
            think_end_id: the token that ends a thought, if responses may begin with one.
        """
        self._decode, self._think_end_id = decode, think_end_id
        self._strings = [string for string in strings if string]
        self._reach = BYTES_PER_CHARACTER * max(map(len, self._strings), default=0)

    def find_end(self, tokens: Sequence[int], num_checked: int = 0) -> int | None:
        """Return the number of tokens up to and including the first that completes a stop string; None without one.

        num_checked: so many first tokens are known to complete none.
        """
        for count in range(num_checked + 1, len(tokens) + 1):
            if self._is_over(tokens[:count]):
                return count
        return None

    def _is_over(self, tokens: Sequence[int]) -> bool:
        begin = max(len(tokens) - self._reach, 0)
        if self._think_end_id is not None:
            if self._think_end_id not in tokens:
                return False
            begin = max(begin, len(tokens) - list(reversed(tokens)).index(self._think_end_id))
        text = self._decode(list(tokens[begin:]))
        return any(string in text for string in self._strings)


class StopStringStreamer(BaseStreamer):
    """Collects the tokens of one response and raises StopStringError after the first stop string."""

    def __init__(self, stops: StopStrings):
        self.tokens: list[int] = []
        self._stops = stops
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, P] first, then new tokens [n]."""
        if self._is_prompt:
            self._is_prompt = False
            return
        num_checked = len(self.tokens)
        self.tokens += value.tolist()
        end = self._stops.find_end(self.tokens, num_checked)
        if end is not None:
            del self.tokens[end:]
            raise StopStringError

    def end(self) -> None:
        """Do nothing: all tokens have been collected."""
