"""Finding reserved tokens that a message spells.

Once a chat is rendered nothing tells a marker of the template from one that somebody wrote: a text with `<|im_end|>`
in it would end its turn, one with the mask token would be taken for noise. Such chats are refused.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer

THINKING_TOKENS = frozenset({"<think>", "</think>"})


@dataclass(frozen=True)
class ReservedTokens:
    """Patterns of the tokens a text may not spell. anywhere: in any text. in_answers: in the content of an assistant,
    which may write its thinking out."""

    anywhere: re.Pattern[str]
    in_answers: re.Pattern[str]


def find_reserved_tokens(tokenizer: Tokenizer, mask_token: str) -> ReservedTokens:
    """Special tokens of the tokenizer, thinking tokens and the mask token."""
    added = tokenizer.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special or token.content in THINKING_TOKENS} | {mask_token}
    return ReservedTokens(re.compile(_alternatives(special)), re.compile(_alternatives(special - THINKING_TOKENS)))


def _alternatives(texts: Iterable[str]) -> str:
    """Regular expression of any of `texts`, common beginnings written once: a thousand tokens in a few comparisons."""
    rests: dict[str, list[str]] = {}
    for text in texts:
        if not text:
            return ""  # matched so far is enough
        rests.setdefault(text[0], []).append(text[1:])
    branches = [re.escape(first) + _alternatives(rests[first]) for first in sorted(rests)]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
