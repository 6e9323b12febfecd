"""Store every picture of a dataset once: the first shard that has it keeps it, the later ones refer to that.

Workers write shards that have all their pictures. Here, once all are there, the references of the whole dataset are
compared, and what an earlier shard has is taken out of the later ones' files. So the bytes do not depend on which
worker did what. It may be interrupted anywhere: a file is either as its worker wrote it or as it is to be, and the
sizes tell which.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from conf.system.atomic import atomic_file, atomic_write_bytes
from conf.system.errors import UserError
from data_pipeline.prepare.shards import CompleteShard, work_path
from data_pipeline.prepare.writer import writing
from data_pipeline.storage.manifest import ShardImages, compute_sha256, images_path, references_path
from data_pipeline.storage.references import ImageReferences, encode_references

COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class _Pictures:
    """Describes the pictures of a shard as its worker wrote it, each once, in the order of its `.images` file.

    hashes: [n] 32 bytes each. lengths: [n] bytes. of_references: [references] which of them each reference means.
    """

    hashes: np.ndarray
    lengths: np.ndarray
    of_references: np.ndarray


def share_images(directory: Path, shards: list[CompleteShard]) -> list[CompleteShard]:
    """Return the shards of a dataset with each picture in one of them, and their `.references` written.

    Memory is some 200 bytes per picture. Raises UserError if a file was changed since it was written.
    """
    numbered = [shard for shard in shards if shard.contents.documents and shard.contents.images]
    if not numbered:
        return shards
    found = [_list_pictures(_open_work(directory, shard)) for shard in numbered]
    sizes = [len(pictures.hashes) for pictures in found]
    first_of_all = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    owners = _find_owners(np.concatenate([pictures.hashes for pictures in found]))
    stays = owners == np.arange(len(owners))
    lengths = np.concatenate([pictures.lengths for pictures in found])
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    offsets = _find_offsets(np.where(stays, lengths, 0), first_of_all)
    done = {}
    for number, (shard, pictures) in enumerate(zip(numbered, found, strict=True)):
        own = slice(first_of_all[number], first_of_all[number + 1])
        owner = owners[own][pictures.of_references]
        images = _compact(directory, shard, lengths[own], stays[own])
        done[shard.name] = _refer(directory, shard, images, shard_of[owner], offsets[owner])
    return [done.get(shard.name, shard) for shard in shards]


def _open_work(directory: Path, shard: CompleteShard) -> ImageReferences:
    return ImageReferences(references_path(work_path(directory, shard.name)))


def _list_pictures(references: ImageReferences) -> _Pictures:
    every = references.all
    _, first, of_references = np.unique(every["offset"], return_index=True, return_inverse=True)
    return _Pictures(every["sha256"][first].view("S32"), every["length"][first].astype(np.int64), of_references)


def _find_owners(hashes: np.ndarray) -> np.ndarray:
    """Return [n] the number of the first picture with the same hash as each."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse]


def _find_offsets(lengths: np.ndarray, first_of_all: np.ndarray) -> np.ndarray:
    """Return [n] where each picture begins in the file of its shard. lengths: 0 where it does not stay."""
    ends = np.append(0, np.cumsum(lengths))
    starts_of_shards = np.repeat(ends[first_of_all[:-1]], np.diff(first_of_all))
    return ends[:-1] - starts_of_shards


def _compact(directory: Path, shard: CompleteShard, lengths: np.ndarray, stays: np.ndarray) -> ShardImages:
    """Take the pictures that do not stay out of a shard's file, unless that is done already."""
    path = images_path(directory / shard.name)
    images = shard.contents.images
    assert images is not None
    size = int(lengths[stays].sum())
    if size == images.num_bytes:
        _check_size(path, images.num_bytes)
        return images
    if path.stat().st_size == size:  # a run that was interrupted after it did this
        return replace(images, num_bytes=size, sha256=compute_sha256(path))
    _check_size(path, images.num_bytes)
    digest = hashlib.sha256()
    with _rewriting(path) as (old, new):
        for length, is_copied in zip(lengths.tolist(), stays.tolist(), strict=True):
            if not is_copied:
                old.seek(length, 1)
                continue
            data = old.read(length)
            digest.update(data)
            new.write(data)
    return replace(images, num_bytes=size, sha256=digest.hexdigest())


@contextmanager
def _rewriting(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    with writing(path), open(path, "rb") as old, atomic_file(path) as new:
        yield old, new


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.is_file() else 0
    if size != expected:
        raise UserError(
            f"{path} was changed after it was made ({size} bytes, not {expected}): delete the folder {path.parent} and "
            "prepare the data again"
        )


def _refer(
    directory: Path, shard: CompleteShard, images: ShardImages, shard_of: np.ndarray, offsets: np.ndarray
) -> CompleteShard:
    """Write the final references of a shard; shard_of, offsets: [references] where the picture of each is."""
    work = _open_work(directory, shard)
    references = np.array(work.all)
    references["shard"], references["offset"] = shard_of, offsets
    content = encode_references(np.diff(work.bounds(0, work.num_documents)), references)
    path = references_path(directory / shard.name)
    with writing(path):
        atomic_write_bytes(path, content)
    images = replace(images, references_sha256=hashlib.sha256(content).hexdigest())
    return replace(shard, contents=replace(shard.contents, images=images))
