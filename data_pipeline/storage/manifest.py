"""What a tokenised dataset says about itself.

A dataset is a folder: `manifest.json` and shards `shard_00000.{bin,idx,json}`. Each shard's `.json` is written after
its tokens and the manifest after all shards: where there is a manifest, the dataset is complete.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from conf.system.atomic import atomic_write_text
from conf.system.errors import UserError

HASH_PIECE_BYTES = 1 << 22
MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ShardManifest:
    """One `.bin`/`.idx` pair in megatron-core's format.

    name: prefix of its files within the dataset's folder.
    documents, tokens: counts; tokens include the end-of-sequence token of every text.
    scored_tokens: of them, those of answers (in chats); all of them in texts.
    max_token_id: largest id, so that a vocabulary can be checked without reading the tokens.
    longest_document: tokens.
    sha256: of the `.bin` file. index_sha256: of the `.idx` file.
    input: name of the file (or hub shard) it was made of. first_row, end_row: rows [first, end) of that input.
    skipped: number of rows left out, by reason.
    """

    name: str
    documents: int
    tokens: int
    scored_tokens: int
    max_token_id: int
    longest_document: int
    sha256: str
    index_sha256: str
    input: str
    first_row: int
    end_row: int
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetManifest:
    """The whole dataset.

    kind: text or chat (conf.schema.DocumentKind). In a chat, the sequences of a document alternate: context, answer,
        context, answer, ...; a text is one sequence.
    dtype: numpy name of the stored integers. eos_token_id, tokenizer_fingerprint: of the tokenizer that made the tokens
        (conf.tokenizer_info). block_padding_token_id: the token that completes the last block of a document or of an
        answer: end-of-sequence in texts, end-of-turn in chats.
    source: where the rows came from, as configured. settings: everything else that decides which tokens there are.
    """

    kind: str
    dtype: str
    tokenizer_fingerprint: str
    block_padding_token_id: int
    source: dict[str, Any]
    settings: dict[str, Any]
    shards: tuple[ShardManifest, ...]
    format_version: int = FORMAT_VERSION

    @property
    def documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def max_token_id(self) -> int:
        """Largest token id of all shards."""
        return max(shard.max_token_id for shard in self.shards)

    @property
    def sha256(self) -> str:
        """Hexadecimal identity of all tokens and documents: the hash of the shards' hashes."""
        hashes = [value for shard in self.shards for value in (shard.sha256, shard.index_sha256)]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def bin_path(prefix: Path | str) -> Path:
    """Token file of the shard at `prefix`."""
    return Path(f"{prefix}.bin")


def index_path(prefix: Path | str) -> Path:
    """Document index of the shard at `prefix`."""
    return Path(f"{prefix}.idx")


def shard_manifest_path(prefix: Path | str) -> Path:
    """Manifest of the shard at `prefix`."""
    return Path(f"{prefix}.json")


def manifest_path(directory: Path | str) -> Path:
    """Manifest of the dataset in `directory`."""
    return Path(directory) / MANIFEST_NAME


def compute_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(HASH_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def save_shard_manifest(prefix: Path | str, manifest: ShardManifest) -> None:
    """Write `<prefix>.json`, which declares the shard complete."""
    atomic_write_text(shard_manifest_path(prefix), json.dumps(asdict(manifest), indent=2) + "\n")


def save_manifest(directory: Path | str, manifest: DatasetManifest) -> None:
    """Write `manifest.json`, which declares the dataset complete."""
    totals = {"documents": manifest.documents, "tokens": manifest.tokens}
    atomic_write_text(manifest_path(directory), json.dumps(totals | asdict(manifest), indent=2) + "\n")


def load_manifest(directory: Path | str) -> DatasetManifest:
    """The manifest of the dataset in `directory`.

    Raises UserError when there is none (the dataset was not finished), or when it is not one of this version.
    """
    path = manifest_path(directory)
    if not path.is_file():
        raise UserError(f"{path} does not exist: {directory} holds no finished dataset; run data_pipeline.prepare.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {values['format_version']}, this code reads {FORMAT_VERSION}")
        shards = tuple(_read(ShardManifest, shard) for shard in values["shards"])
        return _read(DatasetManifest, values | {"shards": shards})
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{path} is not a dataset manifest ({error!r}): delete {directory} and prepare again."
        ) from error


def _read[T](kind: type[T], values: dict[str, Any]) -> T:
    return kind(**{item.name: values[item.name] for item in fields(kind)})  # type: ignore[arg-type]
