"""Check that the files of a dataset still are what its manifest describes."""

import os
from pathlib import Path

import numpy as np

from conf.system.errors import UserError
from data_pipeline.storage.manifest import (
    ShardManifest,
    bin_path,
    compute_sha256,
    images_path,
    index_path,
    manifest_path,
    references_path,
    shard_manifest_path,
)

# Sizes (bytes) and modification times (ns) of the files of a shard but its images: with the same ones, they count as
# unchanged.
Stamp = list[int]


def _describe_files(directory: Path, shard: ShardManifest) -> dict[Path, str]:
    """Return the SHA-256 of each file of a shard but that of the images, which are compared whenever one is read."""
    prefix = directory / shard.name
    hashes = {bin_path(prefix): shard.sha256, index_path(prefix): shard.index_sha256}
    return hashes if shard.images is None else hashes | {references_path(prefix): shard.images.references_sha256}


def stamp_shard(directory: Path, shard: ShardManifest, dtype: str) -> Stamp:
    """Return sizes and times of a shard's files. Raises UserError if one is gone or of another size than it had."""
    stamp: Stamp = []
    for path in _describe_files(directory, shard):
        found = _stat(path, directory)
        stamp += [found.st_size, found.st_mtime_ns]
    prefix = directory / shard.name
    _check_size(bin_path(prefix), stamp[0], shard.tokens * np.dtype(dtype).itemsize)
    if shard.images and shard.images.num_bytes:
        path = images_path(prefix)
        _check_size(path, _stat(path, directory).st_size, shard.images.num_bytes)
    return stamp


def _stat(path: Path, directory: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist, but {manifest_path(directory)} lists it: {remedy(directory)}"
        ) from None


def _check_size(path: Path, size: int, expected: int) -> None:
    if size != expected:
        raise UserError(
            f"{path} has {size} bytes, {manifest_path(path.parent)} describes {expected}: the shard was changed after "
            f"it was written; {remedy(path.parent)}"
        )


def is_newer_than_manifest(directory: Path, shard: ShardManifest) -> bool:
    """Return whether a file of the shard is newer than the shard's own manifest, which prepare writes last."""
    try:
        written = shard_manifest_path(directory / shard.name).stat().st_mtime_ns
    except FileNotFoundError:
        return True
    return any(path.stat().st_mtime_ns > written for path in _describe_files(directory, shard))


def check_shard_files(directory: Path, shard: ShardManifest, dtype: str) -> None:
    """Raise UserError if a shard's files are gone or are not what the manifest describes.

    Their contents are read only if they are newer than the shard's own manifest.
    """
    stamp_shard(directory, shard, dtype)
    if is_newer_than_manifest(directory, shard):
        verify_shard(directory, shard)


def verify_shard(directory: Path, shard: ShardManifest, with_images: bool = False) -> None:
    """Raise UserError if the SHA-256 of a file of a shard is not that of its manifest; reads all of it.

    with_images: that of the images, too.
    """
    hashes = _describe_files(directory, shard)
    if with_images and shard.images and shard.images.num_bytes:
        hashes[images_path(directory / shard.name)] = shard.images.sha256
    for path, expected in hashes.items():
        if compute_sha256(path) != expected:
            raise UserError(
                f"{path} is not what {manifest_path(directory)} describes (its SHA-256 differs): the shard was changed "
                f"after it was written; {remedy(directory)}"
            )


def remedy(directory: Path) -> str:
    """Return what to do about a dataset that was changed."""
    return f"delete {directory} and prepare the data again, or bring back the former files."
