"""Kernels that torch.compile made, in a file that every later start of a run reads instead of compiling them again.

What the file holds is torch's own: torch.compiler.save_cache_artifacts, which reads back into the cache folder of this
machine (TORCHINDUCTOR_CACHE_DIR). torch looks its entries up by the content of the function, the shapes of its inputs,
its own version, Triton's and the device: an entry that does not fit is not used.
"""

import hashlib
import logging
import re
import time
from pathlib import Path

import torch

from conf.system.atomic import atomic_write_bytes
from pretrain.run.process_group import Ranks, gather_over_ranks

logger = logging.getLogger(__name__)

SUFFIX = ".kernels"
DIGEST_BYTES, LENGTH_BYTES = hashlib.sha256().digest_size, 8
MOST_PARTS = 8  # of a file; a start that compiles nothing adds none


class KernelCache:
    """Holds the kernels of all ranks whose device has the same name and number, in one file.

    torch 2.13 puts the number of a device into its keys, so ranks of one node share nothing with each other, and all
    they need with the same rank of every other node. A file begins with the SHA-256 of the rest: torch would run what
    a changed byte made of a kernel. Whatever goes wrong is a warning, and the run compiles.

    has_file: whether there is a whole file; kernels that torch still had in its own folder are worth saving otherwise.
    """

    def __init__(self, path: Path, is_writer: bool) -> None:
        """Take the file at `path`. is_writer: whether this rank writes it."""
        self.path, self.is_writer, self.has_file = path, is_writer, False
        self._parts: list[bytes] = []

    def load(self) -> int:
        """Hand the file to torch and return how many entries it has; 0 if there is none that is whole."""
        began = time.perf_counter()
        try:
            content = self.path.read_bytes()
            self._parts = _unwrap(content)
            num_entries = sum(map(_load_part, self._parts))
        except FileNotFoundError:
            return 0
        except Exception as error:  # of the disk, or of whatever torch does with what it reads
            logger.warning(f"{self.path} cannot be used ({error}): this run compiles its kernels and replaces it")
            self._parts = []
            return 0
        self.has_file, seconds = True, time.perf_counter() - began
        logger.info(f"{self.path}: {num_entries} entries, {len(content) / 1e6:.1f} MB, read in {seconds:.1f} s")
        return num_entries

    def save(self) -> None:
        """Add everything this process has compiled or found; nothing on ranks that do not write."""
        if not self.is_writer:
            return
        try:
            saved = torch.compiler.save_cache_artifacts()
            if saved is None:
                return
            # torch appends to what it gave before and reads the end alone, so what it gave before stays a part.
            self._parts = [*self._parts, saved[0]][-MOST_PARTS:]
            atomic_write_bytes(self.path, _wrap(self._parts))
        except Exception as error:
            logger.warning(f"{self.path} cannot be written ({error}): the next start compiles its kernels again")
            return
        self.has_file = True
        logger.info(f"{self.path}: compiled kernels saved, {sum(map(len, self._parts)) / 1e6:.1f} MB")


def open_kernel_cache(folder: str | None, ranks: Ranks) -> KernelCache | None:
    """Return the cache of this rank's device in `folder`, loaded; None without a folder. All ranks call this together.

    The first of the ranks that share a file writes it.
    """
    if folder is None:
        return None
    name = name_cache_file(ranks.device)
    names = gather_over_ranks(lambda: name)
    cache = KernelCache(Path(folder) / name, names.index(name) == ranks.rank)
    cache.load()
    return cache


def name_cache_file(device: torch.device) -> str:
    """Name the file after whatever kernels cannot be shared across: torch, and the kind and number of the device."""
    kind = device.type
    if device.type == "cuda":
        kind = f"{torch.cuda.get_device_name(device)}_{device.index}"
    return re.sub(r"[^\w.+-]+", "-", f"torch-{torch.__version__}_{kind}") + SUFFIX


def _load_part(part: bytes) -> int:
    """Write torch's entries into its cache folder and return their number."""
    info = torch.compiler.load_cache_artifacts(part)
    if info is None:
        raise ValueError("torch does not understand it")
    return sum(map(len, info.artifacts.values()))


def _wrap(parts: list[bytes]) -> bytes:
    content = b"".join(len(part).to_bytes(LENGTH_BYTES, "little") + part for part in parts)
    return hashlib.sha256(content).digest() + content


def _unwrap(content: bytes) -> list[bytes]:
    """Return the parts of a file. Raises: ValueError if it is not as it was written."""
    digest, content = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("it is damaged")
    parts = []
    while content:
        end = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
        parts.append(content[LENGTH_BYTES:end])
        content = content[end:]
    return parts
