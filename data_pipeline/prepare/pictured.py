"""Read the pictures that the records of image chats name, one record after another, so that few are in memory."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.encoder import Skip
from data_pipeline.images.chat import PicturedChat, read_pictured_chat
from data_pipeline.prepare.part import Part, RecordBatch, Selection, count_value_bytes


def read_pictured(batches: Iterable[RecordBatch], part: Part, selection: Selection, skip: int) -> Iterator[RecordBatch]:
    """Yield batches of one record from number `skip` on, whose values are PicturedChat, or Skip.

    batches: of all records of `part`. text_bytes of a batch is the size of its pictures and texts, so the same records
    have the same in every format.
    """
    folder = _find_folder(part)
    for batch in batches:
        left = [(number, value) for number, value in zip(batch.numbers, batch.values, strict=True) if number >= skip]
        batch.values.clear()
        for place, (number, value) in enumerate(left):
            left[place] = (number, None)  # what is done is not in memory any more
            one = _read(number, value, folder, selection)
            yield one if place < len(left) - 1 else replace(one, end=batch.end, progress=batch.progress)
        if not left and batch.end > skip:
            yield RecordBatch([], [], batch.end, 0, batch.progress)


def _find_folder(part: Part) -> Path | None:
    """Return the folder that paths in records are relative to."""
    if part.reader == "hub":
        return None
    return Path(part.path) if part.reader == "saved" else Path(part.path).parent


def _read(number: int, value: Any, folder: Path | None, selection: Selection) -> RecordBatch:
    chat = read_pictured_chat(value, folder)
    size = 0
    if isinstance(chat, PicturedChat):
        size = chat.num_bytes + count_value_bytes(chat.messages)
    if not selection.takes(chat if isinstance(chat, Skip) else chat.identify()):
        return RecordBatch([], [], number + 1, size, 0)
    return RecordBatch([number], [chat], number + 1, size, 0)
