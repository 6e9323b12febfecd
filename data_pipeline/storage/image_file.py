"""Read the pictures of a shard: their files lie end to end in one file, each content once."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from conf.system.errors import UserError


@dataclass(frozen=True)
class StoredImage:
    """Names a stored picture: bytes [offset, offset + length) of the file `path`, whose SHA-256 is `sha256` (hex)."""

    path: Path
    offset: int
    length: int
    sha256: str

    def read(self) -> bytes:
        """Return the bytes. Raises UserError if the file cannot be read or holds something else."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.length)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise UserError(
                f"{self} was changed after it was written (its SHA-256 differs): delete {self.path.parent} and prepare "
                "the data again, or bring back the former files"
            )
        return data

    def __str__(self) -> str:
        return f"the image of {self.length} bytes at byte {self.offset} of {self.path}"
