"""Index the packing of a whole dataset: built once and saved beside it, as `packing_<hash>.entries`, then `.json`.

The hash covers the data, the form of a sequence and the packing, so another one gives another pair of files. If the
folder cannot be written, the index lies in the temporary folder. It holds sizes and times of the shards' files: a shard
that has changed is compared with its manifest before it is read.
"""

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from conf.system.atomic import atomic_file, atomic_write_text
from conf.system.lock import wait_for_lock
from data_pipeline.packing.counts import PackingCounts
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.packers import Packer, PackingIndex
from data_pipeline.packing.windows import CHATS_PER_WINDOW
from data_pipeline.storage.checks import Stamp
from data_pipeline.storage.tokens import StoredTokens

VERSION = 1
# Names of counts on disk, where they are not those of PackingCounts: indexes of the first version stay valid.
COUNTS_ON_DISK = {"block_padding_tokens": "completion_rows", "padding_tokens": "filler_rows"}
NEW_COUNTS = ("images", "image_tokens")  # written where there are any; the first version knew none
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackingIndexBuilder:
    """Finds or builds the index of `stored` under `packer`.

    checks_files: compare the shards' files with what they were when the index was built, and with their manifest.
    """

    stored: StoredTokens
    packer: Packer
    checks_files: bool

    def load(self) -> PackingIndex:
        """Return the index, built now if it is not there; of several processes that want it one builds it."""
        path = self._choose_path()
        stamps = self._stamp() if self.checks_files else None
        found = _find(path, stamps)
        if found is not None:
            return found
        with open(f"{path}.lock", "a") as lock:
            wait_for_lock(lock)
            return _find(path, stamps) or self._build(path, stamps)

    def _choose_path(self) -> Path:
        """Return the path of the index without suffix: beside the data, else in this user's temporary folder."""
        packing = [VERSION, type(self.packer).__name__, _spell_form(self.packer.form), CHATS_PER_WINDOW]
        identity = json.dumps([*packing, self.stored.sha256])
        name = f"packing_{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        folder = self.stored.path if self.stored.manifest else self.stored.path.parent
        if (folder / f"{name}.json").exists() or os.access(folder, os.W_OK):
            return folder / name
        folder = Path(tempfile.gettempdir()) / f"packing_of_user_{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / name

    def _stamp(self) -> list[Stamp | None]:
        return [self.stored.stamp(number) for number in range(self.stored.num_shards)]

    def _build(self, path: Path, stamps: list[Stamp | None] | None) -> PackingIndex:
        """Write the entries, then the file that declares them complete; the caller holds the lock."""
        stamps = self._stamp() if stamps is None else stamps
        known = _read(path).get("stamps") or [None] * len(stamps)
        for number, (now, before) in enumerate(zip(stamps, known, strict=True)):
            if now != before:
                self.stored.verify(number, was_known=before is not None)
        length = self.packer.form.sequence_length
        logger.info("%s: packing %d shards into sequences of %d", self.stored.path, self.stored.num_shards, length)
        with atomic_file(_entries_path(path)) as file:
            starts, counts = self._write(file)
        used = {name: count for name, count in asdict(counts).items() if count or name not in NEW_COUNTS}
        named = {COUNTS_ON_DISK.get(name, name): count for name, count in used.items()}
        values = {"counts": named, "starts": starts, "stamps": stamps}
        atomic_write_text(_manifest_path(path), json.dumps(values) + "\n")
        return _map(path, values)

    def _write(self, file: IO[bytes]) -> tuple[list[list[int]], PackingCounts]:
        """Write entries into `file`; return [entry, sequence] at the start of each shard and at the end, and counts."""
        starts, counts = [[0, 0]], PackingCounts()
        for number in range(self.stored.num_shards):
            entries, of_shard = self.packer.build_entries(self.stored.open_shard(number))
            file.write(entries.tobytes())
            counts += of_shard
            starts.append([starts[-1][0] + len(entries), counts.sequences])
        return starts, counts


def _spell_form(form: SequenceForm) -> str:
    """Return the form as the first version spelled it: the hash of this text names the index's files."""
    return (
        f"SequenceForm(sequence_length={form.sequence_length}, block_size={form.block_size}, "
        f"alignment={form.alignment}, isolate_documents={form.isolate_documents}, "
        f"completion_loss={form.block_padding_loss}, overlong_chats={form.overlong_chats!r})"
    )


def _entries_path(path: Path) -> Path:
    return Path(f"{path}.entries")


def _manifest_path(path: Path) -> Path:
    """Return the path of the file that declares the entries complete."""
    return Path(f"{path}.json")


def _find(path: Path, stamps: list[Stamp | None] | None) -> PackingIndex | None:
    """Return the index at `path` if it is whole and the data are those it was built from."""
    values = _read(path)
    if not values or (stamps is not None and values["stamps"] != stamps):
        return None
    try:
        return _map(path, values)
    except (OSError, ValueError):  # it is built again
        return None


def _read(path: Path) -> dict[str, Any]:
    """Return the content of the .json file; nothing if it is missing or broken."""
    try:
        values = json.loads(_manifest_path(path).read_text(encoding="utf-8"))
        return values if {"counts", "starts", "stamps"} <= values.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _map(path: Path, values: dict[str, Any]) -> PackingIndex:
    """Map the entries. Raises ValueError if their file is too short."""
    starts = values["starts"]
    num_entries = starts[-1][0]
    entries = np.zeros((0, 2), dtype=np.int32)
    if num_entries:
        entries = np.memmap(_entries_path(path), dtype=np.int32, mode="r", shape=(num_entries, 2))
    named = values["counts"]
    names = {item.name: COUNTS_ON_DISK.get(item.name, item.name) for item in fields(PackingCounts)}
    needed = {name: key for name, key in names.items() if key in named or name not in NEW_COUNTS}
    counts = PackingCounts(**{name: named[key] for name, key in needed.items()})
    return PackingIndex(entries, [start[0] for start in starts], [start[1] for start in starts], counts)
