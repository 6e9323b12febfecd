"""Bring records with images into one form: a chat of texts, and where in them which pictures stand.

A record names its pictures in the parts of a message's content, or in a list beside the messages, for which
placeholders stand in the messages: parts {"type": "image"} without a picture or, where there are none, `<image>` in
texts. FineVision's records, {"user", "assistant"} turns instead of messages, need no placeholder: their pictures come
first.

Imported by worker processes, so it must import neither torch nor configuration libraries.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.chat.messages import Message
from data_pipeline.encoder import Skip
from data_pipeline.images.sources import LARGEST_IMAGES_BYTES, TOO_LARGE, UnusableImage, read_image, source_of_part

PLACEHOLDER = "<image>"
IMAGE_TYPES = ("image", "image_url")
DO_NOT_MATCH = "images and placeholders do not match"
CAPTION_PROMPT = "Describe the image."  # of pictures that come with a caption alone


@dataclass(frozen=True)
class Picture:
    """Holds the file of a picture. sha256: of it, in hexadecimal."""

    data: bytes
    sha256: str


@dataclass(frozen=True)
class PicturedChat:
    """Holds a chat whose messages are texts.

    messages, tools: as a record has them, but no content has a part that is an image.
    places: (message, character of its content) before which each image stands, in order. pictures: in that order.
    """

    messages: Any
    tools: Any
    places: list[tuple[int, int]]
    pictures: list[Picture]

    @property
    def num_bytes(self) -> int:
        """Return the size of the pictures."""
        return sum(len(picture.data) for picture in self.pictures)

    def insert(self, messages: list[Message], text: str) -> list[Message]:
        """Return the checked `messages` of this chat with `text` in place of every image."""
        inserted = [dict(message) for message in messages]
        for number, place in reversed(self.places):
            content = inserted[number]["content"]
            inserted[number]["content"] = content[:place] + text + content[place:]
        return inserted

    def identify(self) -> Any:
        """Return what is the same for the same chat, however its pictures were given; as Selection takes it."""
        if not self.pictures:
            return {"messages": self.messages, "tools": self.tools}
        pictures = [[*place, picture.sha256] for place, picture in zip(self.places, self.pictures, strict=True)]
        return {"messages": [self.messages, pictures], "tools": self.tools}


@dataclass(frozen=True)
class _Slot:
    """Says where an image stands. source: names its picture; None: it is the next one of those beside the messages."""

    message: int
    place: int
    source: Any


def read_pictured_chat(value: object, folder: Path | None) -> PicturedChat | Skip:
    """Return the chat of a record's value, whose pictures are read but not decoded, or why there is none.

    value: {"messages": messages or turns, "tools": ..., "images": pictures beside them}; a Skip is returned as it is.
    folder: that paths are relative to; None: there are no files.
    """
    if isinstance(value, Skip) or not isinstance(value, dict):
        return value if isinstance(value, Skip) else Skip("not a list of messages", f"but {type(value).__name__}")
    content, beside = value.get("messages"), _list_beside(value.get("images"))
    messages, has_turns = _to_messages(content)
    texts, slots = _take_images(messages)
    if beside is not None and not slots:  # else `<image>` is text
        texts, slots = _take_placeholders(texts)
    if has_turns and not slots:
        slots = [_Slot(0, 0, None) for _ in beside or ()]
    try:
        slots = _fill(slots, beside or [])
        if wrong := next((slot for slot in slots if texts[slot.message].get("role") == "assistant"), None):
            raise UnusableImage("image in a response", f"message {wrong.message + 1}")
        places = [(slot.message, slot.place) for slot in slots]
        return PicturedChat(texts, value.get("tools"), places, list(_read_pictures(slots, folder)))
    except UnusableImage as error:
        return Skip(error.reason, error.detail)


def _list_beside(images: Any) -> list[Any] | None:
    """Return the pictures beside the messages: a list of them, or one alone."""
    return images if images is None or isinstance(images, list) else [images]


def _to_messages(content: Any) -> tuple[Any, bool]:
    """Return messages, and whether they were turns {"user", "assistant"}."""
    if not isinstance(content, list) or not content or not all(map(_is_turn, content)):
        return content, False
    sides = ("user", "assistant")
    return [{"role": side, "content": turn.get(side)} for turn in content for side in sides], True


def _is_turn(item: object) -> bool:
    return isinstance(item, dict) and "role" not in item and ("user" in item or "assistant" in item)


def _take_images(messages: Any) -> tuple[Any, list[_Slot]]:
    """Return messages without parts that are images, and where these stood; what is no message stays as it is."""
    if not isinstance(messages, list):
        return messages, []
    texts, slots = [], []
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(map(_is_known, content)):
            text = ""
            for part in content:
                if _is_image(part):
                    slots.append(_Slot(number, len(text), source_of_part(part)))
                else:
                    text += part["text"]
            message = message | {"content": text}
        texts.append(message)
    return texts, slots


def _is_image(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") in IMAGE_TYPES


def _is_known(part: Any) -> bool:
    return _is_image(part) or (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _take_placeholders(texts: Any) -> tuple[Any, list[_Slot]]:
    """Return messages without `<image>`, and where it stood; responses stay as they are."""
    if not isinstance(texts, list):
        return texts, []
    without, found = [], []
    for number, message in enumerate(texts):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str) and message.get("role") != "assistant":
            first, *rest = content.split(PLACEHOLDER)
            text = first
            for part in rest:
                found.append(_Slot(number, len(text), None))
                text += part
            message = message | {"content": text}
        without.append(message)
    return without, found


def _fill(slots: list[_Slot], beside: list[Any]) -> list[_Slot]:
    """Return the slots with a source each. Raises UnusableImage if placeholders and pictures differ in number."""
    num_placeholders = sum(slot.source is None for slot in slots)
    if num_placeholders != len(beside):
        raise UnusableImage(DO_NOT_MATCH, f"{len(beside)} images, {num_placeholders} placeholders")
    left = iter(beside)
    return [slot if slot.source is not None else replace(slot, source=next(left)) for slot in slots]


def _read_pictures(slots: list[_Slot], folder: Path | None) -> Iterator[Picture]:
    num_bytes = 0
    for slot in slots:
        data = read_image(slot.source, folder)
        num_bytes += len(data)
        if num_bytes > LARGEST_IMAGES_BYTES:
            raise UnusableImage(TOO_LARGE, f"those of a chat have more than {LARGEST_IMAGES_BYTES} bytes")
        yield Picture(data, hashlib.sha256(data).hexdigest())
