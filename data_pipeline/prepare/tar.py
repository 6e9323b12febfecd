"""Read tar files as WebDataset writes them: neighbouring files with the same name up to its first dot are a sample.

A sample has pictures (.jpg, .png, ...) and a .json with the messages or turns of a chat, in which placeholders stand
for the pictures in their order; or a .txt with a caption, which answers CAPTION_PROMPT. Other files are passed over.
"""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

import orjson

from conf.system.errors import UserError
from data_pipeline.encoder import Skip
from data_pipeline.images.chat import CAPTION_PROMPT
from data_pipeline.images.sources import LARGEST_IMAGES_BYTES, TOO_LARGE
from data_pipeline.prepare.inputs import PICTURE_SUFFIXES, InputFile
from data_pipeline.prepare.part import IMAGES_KEY, Part, RecordBatch, Wanted

NO_TEXT = Skip("sample has neither .json nor .txt")


def plan_tar(file: InputFile) -> Iterator[Part]:
    """Yield the one part of a tar file."""
    yield Part(
        reader="tar",
        name=file.name,
        path=str(file.path),
        start=0,
        end=file.size,
        first_record=0,
        size=file.size,
        options={},
    )


def read_tar(part: Part, wanted: Wanted, skip: int) -> Iterator[RecordBatch]:
    """Yield the samples from number `skip` on, one at a time; of those before only headers are read."""
    with _reading(part.path), tarfile.open(part.path, "r:") as tar:
        position = 0
        for number, (_, members) in enumerate(groupby(_list_files(tar), key=_name_sample)):
            sample = list(members)
            start, position = position, sample[-1].offset_data + sample[-1].size
            if number >= skip:
                yield RecordBatch([number], [_read_sample(tar, sample, wanted)], number + 1, 0, position - start)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except tarfile.TarError as error:
        raise UserError(f"{path} is damaged, was cut off or is no plain tar file: {error}") from error


def _list_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the files in a tar; the library would remember all of them."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] (typeshed lacks it)
        if member.isfile():
            yield member


def _name_sample(member: tarfile.TarInfo) -> str:
    """Return the name of a file up to the first dot after its folders."""
    path = PurePosixPath(member.name)
    return str(path.with_name(path.name.partition(".")[0] or path.name))


def _read_sample(tar: tarfile.TarFile, members: list[tarfile.TarInfo], wanted: Wanted) -> Any:
    """Return the value of a sample's record; see read_pictured_chat."""
    if sum(member.size for member in members) > LARGEST_IMAGES_BYTES:
        return Skip(TOO_LARGE, f"{members[0].name} and its neighbours have more than {LARGEST_IMAGES_BYTES} bytes")
    content = _find_text(tar, members, wanted.column)
    if isinstance(content, Skip):
        return content
    pictures = [_read(tar, member) for member in members if member.name.lower().endswith(PICTURE_SUFFIXES)]
    return wanted.combine(content, {IMAGES_KEY: pictures})


def _find_text(tar: tarfile.TarFile, members: list[tarfile.TarInfo], column: str) -> Any:
    """Return messages or turns, or an object with messages and what is beside them; or why there are none."""
    for member in members:
        if member.name.lower().endswith(".json"):
            return _parse(_read(tar, member), column)
    for member in members:
        if member.name.lower().endswith(".txt"):
            try:
                return [{"user": CAPTION_PROMPT, "assistant": _read(tar, member).decode().strip()}]
            except UnicodeDecodeError as broken:
                return Skip("invalid UTF-8", f"byte {broken.start + 1} of {member.name}")
    return NO_TEXT


def _parse(data: bytes, column: str) -> Any:
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        return Skip("broken JSON", f"{error.msg}, character {error.pos + 1}")
    if not isinstance(record, dict):
        return record
    if column not in record:
        return Skip(f"no column {column!r}", f"but {', '.join(record) or 'none'}"[:200])
    return {"messages": record[column], "tools": record.get("tools")}


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # it is a regular file
    return file.read()
