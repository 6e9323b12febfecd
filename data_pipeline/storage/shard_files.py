"""Whether the files of a shard are still those its manifest describes. Imports nothing heavy."""

from pathlib import Path

import numpy as np

from conf.system.errors import UserError
from data_pipeline.storage.manifest import (
    ShardManifest,
    bin_path,
    compute_sha256,
    index_path,
    manifest_path,
    shard_manifest_path,
)

# Sizes (bytes) and modification times (ns) of the two files of a shard: while they stay, the files are taken to stay.
Stamp = list[int]


def stamp_shard(directory: Path, shard: ShardManifest, dtype: str) -> Stamp:
    """Sizes and times of a shard's files. Raises UserError if one is gone or the tokens have another size."""
    prefix = directory / shard.name
    stamp: Stamp = []
    for path in (bin_path(prefix), index_path(prefix)):
        try:
            found = path.stat()
        except FileNotFoundError:
            raise UserError(
                f"{path} does not exist, but {manifest_path(directory)} lists it: {remedy(directory)}"
            ) from None
        stamp += [found.st_size, found.st_mtime_ns]
    expected = shard.tokens * np.dtype(dtype).itemsize
    if stamp[0] != expected:
        raise UserError(
            f"{bin_path(prefix)} has {stamp[0]} bytes, {manifest_path(directory)} describes {expected}: the shard was "
            f"changed after it was written; {remedy(directory)}"
        )
    return stamp


def is_newer_than_manifest(directory: Path, shard: ShardManifest) -> bool:
    """Whether a file of the shard was written after the shard's own manifest, as none is by prepare."""
    prefix = directory / shard.name
    try:
        written = shard_manifest_path(prefix).stat().st_mtime_ns
    except FileNotFoundError:
        return True
    return any(path.stat().st_mtime_ns > written for path in (bin_path(prefix), index_path(prefix)))


def check_shard_files(directory: Path, shard: ShardManifest, dtype: str) -> None:
    """Raises UserError if a shard's files are gone or are not what the manifest describes.

    Their contents are read only if they are newer than the shard's own manifest.
    """
    stamp_shard(directory, shard, dtype)
    if is_newer_than_manifest(directory, shard):
        verify_shard(directory, shard)


def verify_shard(directory: Path, shard: ShardManifest) -> None:
    """Raises UserError if a shard's tokens or index have another SHA-256 than its manifest says; reads all of them."""
    prefix = directory / shard.name
    for path, expected in ((bin_path(prefix), shard.sha256), (index_path(prefix), shard.index_sha256)):
        if compute_sha256(path) != expected:
            raise UserError(
                f"{path} is not what {manifest_path(directory)} describes (its SHA-256 differs): the shard was changed "
                f"after it was written; {remedy(directory)}"
            )


def remedy(directory: Path) -> str:
    """What to do about a dataset that was changed."""
    return f"delete {directory} and prepare the data again, or bring back the former files."
