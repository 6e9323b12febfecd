"""Count what one pass over packed data holds."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class PackingCounts:
    """Counts what one pass over the data holds.

    sequences; documents: those that are used. tokens: of them, scored_tokens: those of responses and texts.
    block_padding_tokens, padding_tokens: positions without text; tokens and these two add up to sequences * S.
    truncated_chats, truncated_tokens: chats cut to a sequence, and what was cut off.
    dropped_chats, dropped_tokens: chats left out. tokens + truncated_tokens + dropped_tokens = tokens on disk.
    images; image_tokens: of tokens, those that stand for images.
    """

    sequences: int = 0
    documents: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    block_padding_tokens: int = 0
    padding_tokens: int = 0
    truncated_chats: int = 0
    truncated_tokens: int = 0
    dropped_chats: int = 0
    dropped_tokens: int = 0
    images: int = 0
    image_tokens: int = 0

    def __add__(self, other: "PackingCounts") -> "PackingCounts":
        names = [item.name for item in fields(PackingCounts)]
        return PackingCounts(**{name: getattr(self, name) + getattr(other, name) for name in names})
