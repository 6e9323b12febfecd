"""Write the shards of a part, each with a note that says it is complete; and what parent and workers send each other.

While a source is being prepared its folder holds `.work/<shard>.json`, the note on every complete shard,
`.work/<shard>.skipped.jsonl`, the records left out of it, and `.work/<shard>.references`, its images. Notes and lists
number records from the part's first one: a part of a .jsonl does not know how many lines come before it. finish.py
does, once all parts are done.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import orjson

from conf.system.atomic import atomic_write_bytes, atomic_write_text
from conf.system.errors import UserError
from data_pipeline.encoder import RecordEncoder, Skip, build_text_encoder
from data_pipeline.prepare.part import TOOLS_COLUMN, Part, RecordBatch, Selection, Wanted
from data_pipeline.prepare.plan import read_records
from data_pipeline.prepare.writer import DocumentWriter, ShardContents, ShardWriter, writing
from data_pipeline.storage.manifest import ShardImages, bin_path, index_path

WORK_FOLDER = ".work"
BATCH_BYTES = 1 << 18
# Keys of a note that are spelled otherwise on disk, as in the first version of the format.
KEYS_ON_DISK = {"contents": "facts", "first_record": "first_row", "end_record": "end_row", "num_records": "rows"}


@dataclass(frozen=True)
class Job:
    """Settings that all parts of a source share. directory: of the dataset. See conf.schema for the rest."""

    directory: Path
    kind: str
    tokenizer_dir: Path
    mask_token: str
    chat_template: str | None
    column: str
    selection: Selection
    shard_bytes: int
    dtype: str
    images_column: str | None = None

    @property
    def wanted(self) -> Wanted:
        """Return what to read. A batch is never cut, so it must not be larger than a shard."""
        tools_column = None if self.kind == "text" else TOOLS_COLUMN
        batch_bytes = min(BATCH_BYTES, self.shard_bytes)
        return Wanted(self.column, self.selection, batch_bytes, tools_column, self.images_column)

    def cuts(self, part: Part) -> bool:
        """Return whether a part may become several shards; the pictures that its records name may be anywhere."""
        return part.is_stream or self.images_column is not None

    def build_encoder(self) -> RecordEncoder:
        """Build the encoder of this kind of documents. Raises UserError as its own builder does."""
        if self.kind == "text":
            return build_text_encoder(self.tokenizer_dir, self.mask_token)
        # They import transformers' template engine, which workers on texts need not wait for.
        if self.kind == "image_chat":
            from data_pipeline.images.encoder import build_image_chat_encoder

            return build_image_chat_encoder(self.tokenizer_dir, self.mask_token, self.chat_template)
        from data_pipeline.chat.encoder import build_chat_encoder

        return build_chat_encoder(self.tokenizer_dir, self.mask_token, self.chat_template)

    def build_writer(self, name: str) -> DocumentWriter:
        """Build the writer of the shard `name`. Raises UserError if its files cannot be opened."""
        tokens = ShardWriter(self.directory / name, self.dtype, is_chat=self.kind != "text")
        if self.kind != "image_chat":
            return tokens
        from data_pipeline.prepare.image_writer import PicturedShardWriter

        return PicturedShardWriter(tokens, self.directory / name, work_path(self.directory, name))


@dataclass(frozen=True)
class TokenizeTask:
    """Tell a worker to tokenise a part from shard `shard_number` and record `skip` on; see tokenize_part."""

    part: Part
    shard_number: int
    skip: int


@dataclass
class Advance:
    """Reports what was done since the last report. progress: of Part.size. skipped: records."""

    progress: int
    tokens: int
    skipped: int


@dataclass(frozen=True)
class Done:
    """Reports that a task is done."""


@dataclass(frozen=True)
class Failed:
    """Reports that a task failed. message: for users if is_user_error, else a traceback."""

    message: str
    is_user_error: bool


@dataclass(frozen=True)
class CompleteShard:
    """Describes a shard that is on disk.

    first_record, end_record: counted from the part's first record. num_records: taken, skipped ones included.
    skipped: records left out, by reason. progress: of Part.size. is_last: whether the part ends here.
    """

    name: str
    contents: ShardContents
    first_record: int
    end_record: int
    num_records: int
    skipped: dict[str, int]
    progress: int
    is_last: bool


def shard_name(part: int, number: int) -> str:
    """Return the name of shard `number` of part `part`; names sort in the order of the records."""
    return f"shard_{part:05d}_{number:04d}"


def tokenize_part(job: Job, task: TokenizeTask, encoder: RecordEncoder, report: Callable[[Advance], None]) -> None:
    """Write the shards of the task's part, from its shard and record on (both 0 at first).

    report: is called after every batch.
    Raises UserError if the input cannot be read or a shard cannot be written; complete shards stay.
    """
    shard = _OpenShard(job, task.part, task.shard_number, task.skip)
    try:
        for batch in read_records(task.part, job.wanted, task.skip):
            if job.cuts(task.part) and shard.text_bytes >= job.shard_bytes:
                shard.publish(is_last=False)
                shard = _OpenShard(job, task.part, shard.number + 1, shard.end_record)
            report(shard.add(batch, encoder))
        shard.publish(is_last=True)
    finally:
        shard.discard()


class _OpenShard:
    """Writes one shard."""

    def __init__(self, job: Job, part: Part, number: int, first_record: int) -> None:
        self.number, self.end_record, self.text_bytes = number, first_record, 0
        self._job, self._part, self._first_record = job, part, first_record
        self._name = shard_name(part.number, number)
        self._writer = job.build_writer(self._name)
        self._skipped_lines: list[bytes] = []
        self._skipped: Counter[str] = Counter()
        self._num_records = self._progress = 0

    def add(self, batch: RecordBatch, encoder: RecordEncoder) -> Advance:
        """Encode and append the batch."""
        documents, skips = _encode(batch, encoder)
        tokens = self._writer.add(documents)
        for number, skip in skips:
            self._skipped[skip.reason] += 1
            line = {"file": self._part.name, "row": number, "reason": skip.reason, "detail": skip.detail}
            self._skipped_lines.append(orjson.dumps(line) + b"\n")
        self.end_record = batch.end
        self.text_bytes += batch.text_bytes
        self._num_records += len(batch.numbers)
        self._progress += batch.progress
        return Advance(batch.progress, tokens, len(skips))

    def publish(self, is_last: bool) -> None:
        """Give the files their final names, then write the note that says they are complete."""
        shard = CompleteShard(
            name=self._name,
            contents=self._writer.publish(),
            first_record=self._first_record,
            end_record=self.end_record,
            num_records=self._num_records,
            skipped=dict(sorted(self._skipped.items())),
            progress=self._progress,
            is_last=is_last,
        )
        with writing(self._job.directory / WORK_FOLDER):
            if self._skipped_lines:
                atomic_write_bytes(skipped_path(self._job.directory, self._name), b"".join(self._skipped_lines))
            note = {KEYS_ON_DISK.get(key, key): value for key, value in asdict(shard).items()}
            atomic_write_text(_note_path(self._job.directory, self._name), json.dumps(note) + "\n")

    def discard(self) -> None:
        """Remove what was not published."""
        self._writer.discard()


def _encode(batch: RecordBatch, encoder: RecordEncoder) -> tuple[list[Any], list[tuple[int, Skip]]]:
    """Return the documents in order, and (number, reason) of the records without one."""
    readable = [value for value in batch.values if not isinstance(value, Skip)]
    encoded = iter(encoder.encode(readable))
    results = [value if isinstance(value, Skip) else next(encoded) for value in batch.values]
    documents = [result for result in results if not isinstance(result, Skip)]
    numbered = zip(batch.numbers, results, strict=True)
    return documents, [(number, result) for number, result in numbered if isinstance(result, Skip)]


def load_complete_shards(directory: Path, part: int) -> list[CompleteShard]:
    """Return the complete shards of a part, from its first one to the first that is missing."""
    shards: list[CompleteShard] = []
    while (path := _note_path(directory, shard_name(part, len(shards)))).exists():
        shards.append(_read_note(json.loads(path.read_text(encoding="utf-8"))))
        if shards[-1].is_last:
            break
    return shards


def check_files(prefix: Path, documents: int, tokens: int, dtype_bytes: int) -> None:
    """Raise UserError if the `.bin`/`.idx` pair at `prefix` is not as large as its manifest implies."""
    if not documents:
        return
    tokens_file = bin_path(prefix)
    complete = tokens_file.is_file() and index_path(prefix).is_file()
    if not complete or tokens_file.stat().st_size != tokens * dtype_bytes:
        raise UserError(
            f"the files of {prefix} were changed after they were made: delete the folder {prefix.parent} and prepare "
            "the data again"
        )


def skipped_path(directory: Path, name: str) -> Path:
    """Return the path of the list of records left out of a shard of an unfinished dataset."""
    return Path(f"{work_path(directory, name)}.skipped.jsonl")


def work_path(directory: Path, name: str) -> Path:
    """Return the prefix of what is noted about a shard of an unfinished dataset."""
    return directory / WORK_FOLDER / name


def _read_note(note: dict[str, Any]) -> CompleteShard:
    values: dict[str, Any] = {item.name: note[KEYS_ON_DISK.get(item.name, item.name)] for item in fields(CompleteShard)}
    images = values["contents"].get("images")
    values["contents"] = ShardContents(**values["contents"] | {"images": images and ShardImages(**images)})
    return CompleteShard(**values)


def _note_path(directory: Path, name: str) -> Path:
    return Path(f"{work_path(directory, name)}.json")
