"""What a tokenised dataset says about itself: `<prefix>.json` beside `<prefix>.bin` and `<prefix>.idx`."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from conf.atomic import atomic_write_text
from conf.errors import UserError

HASH_PIECE_BYTES = 1 << 22


@dataclass
class DatasetManifest:
    """Facts recorded when the dataset was written.

    documents, tokens: counts; tokens include the end-of-sequence token of every document.
    max_token_id: largest id in the data, so that a vocabulary can be checked without reading them.
    dtype: numpy name of the stored integers. sha256: of the whole `.bin` file.
    tokenizer_fingerprint: of the tokenizer that made the tokens (conf.tokenizer_info).
    """

    documents: int
    tokens: int
    max_token_id: int
    dtype: str
    sha256: str
    tokenizer_fingerprint: str


def bin_path(prefix: Path | str) -> Path:
    """Token file of the dataset at `prefix`."""
    return Path(f"{prefix}.bin")


def index_path(prefix: Path | str) -> Path:
    """Document index of the dataset at `prefix`."""
    return Path(f"{prefix}.idx")


def manifest_path(prefix: Path | str) -> Path:
    """Manifest of the dataset at `prefix`."""
    return Path(f"{prefix}.json")


def compute_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(HASH_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def save_manifest(prefix: Path | str, manifest: DatasetManifest) -> None:
    """Write `<prefix>.json`."""
    atomic_write_text(manifest_path(prefix), json.dumps(asdict(manifest), indent=2) + "\n")


def load_manifest(prefix: Path | str) -> DatasetManifest | None:
    """The manifest of `prefix`, or None where there is none (data made by another tool).

    Raises UserError when the file is there but is not a manifest.
    """
    path = manifest_path(prefix)
    if not path.exists():
        return None
    names = {field.name for field in fields(DatasetManifest)}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return DatasetManifest(**{name: values[name] for name in names})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a dataset manifest ({error!r}): tokenise the data again.") from error
