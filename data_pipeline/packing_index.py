"""The packing of a whole dataset, built once and kept beside it: `packing_<hash>.entries`, then `.json`.

The hash covers the data, the form of a sequence and the version of the packing: another one is another pair of files.
In a folder that cannot be written the entries live in a temporary file.
"""

import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from conf.atomic import atomic_write_text
from data_pipeline.packing import Packer, PackingCounts
from data_pipeline.shard import Shard

VERSION = 1
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackingIndex:
    """Where the sequences of a dataset are.

    entries: int32 [n, 2] of all shards, end to end, memory-mapped. entry_starts: [shards + 1] where each shard's lie.
    sequence_starts: [shards + 1] number of each shard's first sequence. counts: of the whole dataset.
    """

    entries: np.ndarray
    entry_starts: list[int]
    sequence_starts: list[int]
    counts: PackingCounts

    def find(self, sequence: int) -> tuple[int, np.ndarray, int]:
        """Shard number, entries of that shard, and number within the shard, of a sequence of the dataset."""
        shard = int(np.searchsorted(self.sequence_starts, sequence, side="right")) - 1
        entries = self.entries[self.entry_starts[shard] : self.entry_starts[shard + 1]]
        return shard, entries, sequence - self.sequence_starts[shard]


@dataclass(frozen=True)
class PackingIndexBuilder:
    """Builds or loads the index of `num_shards` shards.

    stem: path that the names of its files begin with. data_sha256: identity of the data. open_shard: by number.
    """

    stem: str
    data_sha256: str
    packer: Packer
    num_shards: int
    open_shard: Callable[[int], Shard]

    def load(self) -> PackingIndex:
        """The index, built now if it is not there; of several processes that want it one builds it."""
        found = self._find()
        if found is not None:
            return found
        try:
            with open(f"{self.path}.lock", "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                return self._find() or self._build_beside_data()
        except OSError as error:
            logger.warning("the packing of %s is not kept: %s", self.stem, error)
            with tempfile.TemporaryFile() as file:
                starts, counts = self._write(file)
                return _map_entries(file, starts, counts)

    @property
    def path(self) -> Path:
        """Of the index's files, without their endings."""
        identity = json.dumps([VERSION, type(self.packer).__name__, repr(self.packer.form), self.data_sha256])
        return Path(f"{self.stem}packing_{hashlib.sha256(identity.encode()).hexdigest()[:16]}")

    def _find(self) -> PackingIndex | None:
        try:
            values = json.loads(Path(f"{self.path}.json").read_text(encoding="utf-8"))
            with open(f"{self.path}.entries", "rb") as file:
                return _map_entries(file, values["starts"], PackingCounts(**values["counts"]))
        except (OSError, ValueError, KeyError, TypeError):  # absent or broken: it is built again
            return None

    def _build_beside_data(self) -> PackingIndex:
        logger.info("packing %s into sequences of %d", self.stem, self.packer.form.sequence_length)
        partial = Path(f"{self.path}.entries.partial")
        try:
            with open(partial, "wb+") as file:
                starts, counts = self._write(file)
                os.fsync(file.fileno())
                os.replace(partial, f"{self.path}.entries")
                values = {"counts": asdict(counts), "starts": starts}
                atomic_write_text(Path(f"{self.path}.json"), json.dumps(values) + "\n")
                return _map_entries(file, starts, counts)
        finally:
            partial.unlink(missing_ok=True)

    def _write(self, file: IO[bytes]) -> tuple[list[list[int]], PackingCounts]:
        """Entries into `file`; returns [entry, sequence] where each shard starts and the last one ends, and counts."""
        starts, counts = [[0, 0]], PackingCounts()
        for number in range(self.num_shards):
            entries, of_shard = self.packer.build_entries(self.open_shard(number))
            file.write(entries.tobytes())
            counts += of_shard
            starts.append([starts[-1][0] + len(entries), counts.sequences])
        file.flush()
        return starts, counts


def _map_entries(file: IO[bytes], starts: list[list[int]], counts: PackingCounts) -> PackingIndex:
    """The index over a file of entries; the map outlives the file object. Raises ValueError if the file is short."""
    num_entries = starts[-1][0]
    entries = np.memmap(file, dtype=np.int32, mode="r", shape=(num_entries, 2)) if num_entries else np.zeros((0, 2))
    return PackingIndex(entries, [start[0] for start in starts], [start[1] for start in starts], counts)
