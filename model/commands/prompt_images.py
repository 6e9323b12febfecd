"""Images in records of prompts: where they stand in the text, and which files they are. No torch here.

An image is a part of a message's content, as in OpenAI's chats:

    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "picture.png"}}, {"type": "text", ...}]}

or a member of `images` beside `prompt`, `messages`, or FineVision's `texts`. Those take the places of parts without an
image of their own ({"type": "image"}) and of `<|image_start|>` in texts, in their order; where there is no such place,
they stand before the first thing the user says. An image is the path of a file, relative to that of the record, a data:
address, base64 text, or an object with one of these under a name of SOURCE_KEYS.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.system.errors import UserError
from model.hf.image_tokens import IMAGE_TOKENS, expand_image_tokens

if TYPE_CHECKING:
    from model.export.images import PromptImage

IMAGE_START_TEXT = next(iter(IMAGE_TOKENS))
IMAGE_PARTS = ("image", "image_url")  # types of parts
SOURCE_KEYS = ("image_url", "image", "base64", "bytes", "path", "url")

Messages = list[dict[str, Any]]


# Opens an image, raising ValueError; model/export/images.py.
type ReadImage = Callable[[Any], PromptImage]


@dataclass(frozen=True)
class _Place:
    """Where an image stands. source: None if it is one of those beside the messages."""

    source: Any = None


def read_turns(turns: Any, place: str) -> Messages:
    """Return FineVision's `texts`, pairs of user and assistant, as messages. Raises: UserError."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "user" in turn for turn in turns):
        raise UserError(f'{place}: "texts" must be a list of objects with user and assistant')
    roles = ("user", "assistant")
    return [{"role": role, "content": turn[role]} for turn in turns for role in roles if turn.get(role) is not None]


def read_images(images: Any, place: str) -> list[Any]:
    """Return the `images` of a record; none if it has no such key. Raises: UserError unless they are a list."""
    if images is not None and not isinstance(images, list):
        raise UserError(f'{place}: "images" must be a list of paths, addresses or base64, not {type(images).__name__}')
    return images or []


def write_image_places(messages: Messages, images: Sequence[Any], place: str) -> tuple[Messages, list[Any]]:
    """Make the content of every message a text, with `<|image_start|>` where an image stands.

    Args:
        messages: content may be a text or a list of parts; other content stays as it is.
        images: those that stand beside the messages.
        place: file and line, for error messages.

    Returns:
        The messages, and all images in the order of their places.

    Raises:
        UserError: a part that is neither text nor image, or images that do not match the places in number.
    """
    cut = [list(_cut(message["content"], place)) for message in messages]
    places = [part for part in chain(*cut) if isinstance(part, _Place)]
    num_open = sum(part.source is None for part in places)
    if images and not places:
        first = next((number for number, message in enumerate(messages) if message["role"] == "user"), 0)
        cut[first][:0] = [_Place(image) for image in images]
    elif num_open != len(images):
        raise UserError(
            f'{place}: {len(images)} images stand in "images", and {num_open} {IMAGE_START_TEXT} or image parts wait '
            "for one: give as many"
        )
    waiting = deque(images)
    sources = [part.source for part in chain(*cut) if isinstance(part, _Place)]
    sources = [waiting.popleft() if source is None else source for source in sources]
    texts = ["".join(IMAGE_START_TEXT if isinstance(part, _Place) else part for part in parts) for parts in cut]
    return [
        message | {"content": text} if isinstance(message["content"], list | str) else message
        for message, text in zip(messages, texts, strict=True)
    ], sources


def _cut(content: Any, place: str) -> Iterator[str | _Place]:
    """Cut the content of a message into texts and images; nothing for content of another kind."""
    for part in content if isinstance(content, list) else [content] if isinstance(content, str) else []:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind in IMAGE_PARTS:
            yield _Place(_find_source(part))
        elif kind == "text" and isinstance(text, str):
            first, *others = text.split(IMAGE_START_TEXT)
            yield first
            for other in others:
                yield _Place()
                yield other
        else:
            raise UserError(f"{place}: a part of a message is neither text nor image: {str(part)[:80]}")


def _find_source(values: Any) -> Any:
    """Return the image of an object; None if it has none."""
    return next((values[key] for key in SOURCE_KEYS if values.get(key) is not None), None)


def open_images(sources: Sequence[Any], folder: Path, place: str, read: ReadImage | None) -> tuple["PromptImage", ...]:
    """Open the images of a record.

    Args:
        sources: as the record has them.
        folder: the one that paths are relative to.
        place: file and line, for error messages.
        read: opens one, raising ValueError; None for a checkpoint of text alone.

    Raises:
        UserError: an image cannot be read, or the checkpoint reads none.
    """
    if not sources:
        return ()
    if read is None:
        raise UserError(f"{place} has images, but the checkpoint reads text alone: take one that reads images")
    images: list[PromptImage] = []
    for source in sources:
        try:
            images.append(read(_locate(source, folder)))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
    return tuple(images)


def _locate(source: Any, folder: Path) -> Any:
    """Return the file of a path, other text as it is. Raises: ValueError for what is no image at all."""
    while isinstance(source, dict):
        source = _find_source(source)
    if not isinstance(source, str) or not source:
        raise ValueError(f"an image must be a path, a data: address or base64, not {source!r}")
    if source.startswith(("http://", "https://")):
        raise ValueError(f"the image {source} is on the web: download it, so that everybody sees the same")
    try:
        path = folder / source.removeprefix("file://")
        return path if path.is_file() else source
    except OSError:  # text that is too long for a path
        return source


def expand_images(token_ids: list[int], images: Sequence["PromptImage"], place: str) -> list[int]:
    """Replace each `<|image_start|>` by the tokens of its image. Raises: UserError if they do not match in number."""
    try:
        return expand_image_tokens(token_ids, [image.grid for image in images])
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
