"""Read the file of a picture from whatever a record names it by. Nothing is fetched from the network.

Imported by worker processes, so it must import neither torch nor configuration libraries.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

SHOWN_CHARACTERS = 80
SHORTEST_BASE64 = 64  # characters; shorter text is a name, as no picture is that small
LONGEST_NAME = 4096  # of a path
# Of all pictures of a chat together: they are in memory at once. One line of .jsonl has the same limit.
LARGEST_IMAGES_BYTES = 1 << 28
TOO_LARGE = "images are too large"
SOURCE_KEYS = ("image", "path", "url", "base64", "bytes")  # of a part {"type": "image"}


class UnusableImage(Exception):
    """Says why a record's image cannot be used. reason, detail: as data_pipeline.encoder.Skip has them."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def read_image(source: object, folder: Path | None) -> bytes:
    """Return the file of a picture.

    source: its bytes, {"bytes", "path"}, a path, a data: address or base64 text.
    folder: that paths are relative to; None: there are no files.

    Raises UnusableImage.
    """
    if isinstance(source, dict):
        source = next((source[key] for key in ("bytes", "path") if source.get(key) is not None), None)
    if isinstance(source, str):
        source = _read_text(source, folder)
    if source is None:
        raise UnusableImage("image is null")
    if not isinstance(source, bytes):
        raise UnusableImage("image is of no known kind", f"but {type(source).__name__}")
    if not source:
        raise UnusableImage("image is empty")
    return source


def _read_text(text: str, folder: Path | None) -> bytes:
    shown = text[:SHOWN_CHARACTERS]
    if text.startswith(("http://", "https://", "hf://", "s3://", "gs://")):
        raise UnusableImage("image is on the network", shown)
    if text.startswith("data:"):
        header, _, data = text.partition(",")
        if not header.endswith(";base64"):
            raise UnusableImage("image is no base64", shown)
        return _decode(data, shown)
    name = text.removeprefix("file://")
    content = None if folder is None or len(name) > LONGEST_NAME else _read_file(folder / name)
    if content is not None:
        return content
    if name != text or len(text) < SHORTEST_BASE64:
        raise UnusableImage("image file not found", shown)
    return _decode(text, shown)


def _read_file(path: Path) -> bytes | None:
    """Return what a file holds, None where there is none."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > LARGEST_IMAGES_BYTES:
            raise UnusableImage(TOO_LARGE, f"{path.name} is more than {LARGEST_IMAGES_BYTES} bytes")
        return path.read_bytes()
    except ValueError:  # a NUL in the name
        return None
    except OSError as error:
        raise UnusableImage("image file cannot be read", f"{path.name}: {error.strerror}") from None


def _decode(text: str, shown: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UnusableImage("image is no base64", shown) from None


def source_of_part(part: dict[str, Any]) -> Any:
    """Return what a part of a message's content names its picture by, None for a placeholder.

    part: {"type": "image_url", "image_url": {"url": ...} or text} or {"type": "image", one of SOURCE_KEYS}.
    """
    address = part.get("image_url")
    if address is not None:
        return address.get("url") if isinstance(address, dict) else address
    return next((part[key] for key in SOURCE_KEYS if part.get(key) is not None), None)
