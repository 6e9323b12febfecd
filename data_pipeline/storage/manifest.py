"""Describe a tokenised dataset; checks.py compares its files with the description.

A dataset is a folder: `manifest.json` and shards `shard_00000.{bin,idx,json}`, of image chats also `.images` and
`.references` (references.py). Each shard's `.json` is written after its other files and the manifest after all shards:
where there is a manifest, the dataset is complete.
"""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from conf.system.atomic import atomic_write_text
from conf.system.errors import UserError

HASH_CHUNK_BYTES = 1 << 22
NUM_SAMPLED_CHUNKS, SAMPLED_CHUNK_BYTES = 64, 1 << 16
MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
# Keys whose spelling on disk is that of the first data folders, which must stay readable. For the same reason `source`
# and `settings` say `rows` and `num_rows` where the code speaks of records.
KEYS_ON_DISK = {
    "block_padding_token_id": "completion_token_id",
    "first_record": "first_row",
    "end_record": "end_row",
}


@dataclass(frozen=True)
class ShardImages:
    """Describes the images of a shard.

    references: images in its prompts. tokens: of the prompts' tokens, those that stand for them.
    num_bytes, sha256: of the `.images` file. references_sha256: of the `.references` file.
    fixed: number of images that are not shown as they are stored, by what was done.
    """

    references: int
    tokens: int
    num_bytes: int
    sha256: str
    references_sha256: str
    fixed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardManifest:
    """Describes one `.bin`/`.idx` pair in megatron-core's format.

    name: prefix of its files within the dataset's folder.
    documents, tokens: counts; tokens include the end-of-sequence token of every text.
    scored_tokens: of them, those of responses (in chats); all of them in texts.
    max_token_id: largest id, so that a vocabulary can be checked without reading the tokens.
    longest_document: tokens.
    sha256: of the `.bin` file. index_sha256: of the `.idx` file.
    input: name of the file (or hub shard) it was made of. first_record, end_record: records [first, end) of that input.
    skipped: number of records left out, by reason. images: of image chats, else None.
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
    first_record: int
    end_record: int
    skipped: dict[str, int] = field(default_factory=dict)
    images: ShardImages | None = None

    @property
    def hashes(self) -> tuple[str, ...]:
        """Return what identifies the shard: the references hold the hash of every image."""
        own = (self.sha256, self.index_sha256)
        return own if self.images is None else (*own, self.images.references_sha256)


@dataclass(frozen=True)
class DatasetManifest:
    """Describes the whole dataset.

    kind: of the documents (conf.schema.DocumentKind). In a chat, the sequences of a document alternate: prompt,
        response, prompt, response, ...; a text is one sequence.
    dtype: numpy name of the stored integers. eos_token_id, tokenizer_fingerprint: of the tokenizer that made the tokens
        (conf.tokenizer_info). block_padding_token_id: the token that fills the last block of a document or a
        response: end-of-sequence in texts, end-of-turn in chats.
    source: where the records came from, as configured. settings: everything else that decides the tokens.
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
        """Return the number of documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def images(self) -> int:
        """Return the number of images in prompts."""
        return sum(shard.images.references for shard in self.shards if shard.images)

    @property
    def fixed_images(self) -> dict[str, int]:
        """Return the number of images that are not shown as they are stored, by what was done."""
        fixed = Counter[str]()
        for shard in self.shards:
            fixed.update(shard.images.fixed if shard.images else {})
        return dict(sorted(fixed.items()))

    @property
    def max_token_id(self) -> int:
        """Return the largest token id of all shards."""
        return max(shard.max_token_id for shard in self.shards)

    @property
    def sha256(self) -> str:
        """Return the identity of all tokens, documents and images, in hexadecimal: the hash of the shards' hashes."""
        hashes = [value for shard in self.shards for value in shard.hashes]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def bin_path(prefix: Path | str) -> Path:
    """Return the path of the tokens of the shard at `prefix`."""
    return Path(f"{prefix}.bin")


def index_path(prefix: Path | str) -> Path:
    """Return the path of the index of the shard at `prefix`."""
    return Path(f"{prefix}.idx")


def images_path(prefix: Path | str) -> Path:
    """Return the path of the images of the shard at `prefix`."""
    return Path(f"{prefix}.images")


def references_path(prefix: Path | str) -> Path:
    """Return the path of what says which images the documents of the shard at `prefix` hold."""
    return Path(f"{prefix}.references")


def shard_manifest_path(prefix: Path | str) -> Path:
    """Return the path of the manifest of the shard at `prefix`."""
    return Path(f"{prefix}.json")


def manifest_path(directory: Path | str) -> Path:
    """Return the path of the manifest of the dataset in `directory`."""
    return Path(directory) / MANIFEST_NAME


def compute_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sample_sha256(path: Path, size: int) -> str:
    """Return the SHA-256 of a file's size and of chunks spread over it (all of a small one), in hexadecimal."""
    stride = max(SAMPLED_CHUNK_BYTES, size // NUM_SAMPLED_CHUNKS)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start in range(0, size, stride):
            file.seek(start)
            digest.update(file.read(SAMPLED_CHUNK_BYTES))
    return digest.hexdigest()


def save_shard_manifest(prefix: Path | str, manifest: ShardManifest) -> None:
    """Write `<prefix>.json`, which declares the shard complete."""
    atomic_write_text(shard_manifest_path(prefix), json.dumps(_to_disk(manifest), indent=2) + "\n")


def save_manifest(directory: Path | str, manifest: DatasetManifest) -> None:
    """Write `manifest.json`, which declares the dataset complete."""
    shards = [_to_disk(shard) for shard in manifest.shards]
    totals = {"documents": manifest.documents, "tokens": manifest.tokens}
    atomic_write_text(
        manifest_path(directory), json.dumps(totals | _to_disk(manifest) | {"shards": shards}, indent=2) + "\n"
    )


def load_manifest(directory: Path | str) -> DatasetManifest:
    """Return the manifest of the dataset in `directory`.

    Raises UserError when there is none (the dataset was not finished), or when it is not one of this version.
    """
    path = manifest_path(directory)
    if not path.is_file():
        raise UserError(f"{path} does not exist: {directory} holds no finished dataset; run data_pipeline.prepare.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {values['format_version']}, this code reads {FORMAT_VERSION}")
        shards = tuple(map(_read_shard, values["shards"]))
        return _read(DatasetManifest, values | {"shards": shards})
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{path} is not a dataset manifest ({error!r}): delete {directory} and prepare again."
        ) from error


def _to_disk(manifest: ShardManifest | DatasetManifest) -> dict[str, Any]:
    values = {KEYS_ON_DISK.get(key, key): value for key, value in asdict(manifest).items()}
    return {key: value for key, value in values.items() if key != "images" or value is not None}


def _read_shard(values: dict[str, Any]) -> ShardManifest:
    images = values.get("images")
    return _read(ShardManifest, values | {"images": images and ShardImages(**images)})


def _read[T](kind: type[T], values: dict[str, Any]) -> T:
    names = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: values[KEYS_ON_DISK.get(name, name)] for name in names})
