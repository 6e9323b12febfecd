"""Read a dataset of the Hugging Face hub (or a folder that `datasets` can load) as a stream."""

import re
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset_builder

from conf.system.errors import UserError
from data_pipeline.prepare.part import Part, RecordBatch, SourcePlan, Wanted, count_value_bytes, drop_nulls
from data_pipeline.storage.manifest import sample_sha256

COMMIT = re.compile(r"@([0-9a-f]{40})/")
# Classes of errors of a connection, or their bases, in the libraries that `datasets` reads the hub with.
TRANSIENT = {"ConnectionError", "TimeoutError", "TransportError", "HTTPError", "ClientError"}
NUM_RETRIES = 4
RETRY_SECONDS = 1.0  # before the first retry; twice as long before each further one


def plan_hub(input_: Any, column: str) -> SourcePlan:
    """Return the parts and inputs of `conf.schema.InputConfig`: one part per shard of the hub's files.

    The plan holds the commit that the revision names now, so that all workers read the same.
    Raises UserError if the dataset cannot be loaded or has no such column.
    """
    options = {name: getattr(input_, name) for name in ("dataset", "subset", "split", "revision")}
    options["with_images"] = input_.kind.value == "image_chat"
    what = f"the dataset {input_.dataset} (subset {input_.subset}, revision {input_.revision})"
    dataset, files = _patiently(what, lambda: _open(**options))
    commits = {match for file in files for match in COMMIT.findall(file)}
    if len(commits) == 1:
        options["revision"] = commits.pop()
    columns = dataset.column_names or _patiently(what, lambda: list(next(iter(dataset), {})))
    if column not in columns:
        raise UserError(
            f"the dataset {input_.dataset} has no column {column!r} but {', '.join(columns) or 'none'}: "
            "set input.column"
        )
    inputs = [_identify(name) for name in files or [f"{input_.dataset}@{options['revision']}"]]
    names = files if len(files) == dataset.num_shards else [""] * dataset.num_shards
    parts = [
        Part(
            reader="hub",
            name=name or f"{input_.dataset}:{input_.split}:{shard}",
            path=name or f"{input_.dataset}, split {input_.split}, shard {shard}",
            start=shard,
            end=dataset.num_shards,
            first_record=0,
            size=0,
            options=options,
        )
        for shard, name in enumerate(names)
    ]
    return SourcePlan(parts, inputs, [])


def read_hub(part: Part, wanted: Wanted, skip: int) -> Iterator[RecordBatch]:
    """Yield the records of one shard from record `skip` on."""
    end = skip
    for group in _bounded(_records(part, skip), wanted):
        numbers = [number for number, (value, _) in enumerate(group, end) if wanted.selection.takes(value)]
        values = [group[number - end][0] for number in numbers]
        end += len(group)
        yield RecordBatch(numbers, values, end, sum(size for _, size in group), 0)


def _records(part: Part, skip: int) -> Iterator[dict]:
    """Yield records of a shard from `skip` on; a connection that fails is opened again at the next record."""
    record, failures = skip, 0
    while True:
        try:
            dataset, _ = _open_once(**part.options)
            # A column that later files lack must be seen as such, so the records are whole.
            shard = dataset.shard(num_shards=part.end, index=part.start)
            for content in shard.skip(record) if record else shard:
                yield content
                record, failures = record + 1, 0
            return
        except Exception as error:
            _wait_or_raise(f"{part.path}, record {record}", error, failures)
            failures += 1


def _patiently[T](what: str, action: Callable[[], T]) -> T:
    """Return the result of `action`, which is tried again while the connection fails."""
    for failures in count():
        try:
            return action()
        except Exception as error:
            _wait_or_raise(what, error, failures)
    raise AssertionError


def _wait_or_raise(what: str, error: Exception, failures: int) -> None:
    """Sleep if it makes sense to try again after `error` and `failures` others, else raise UserError."""
    if isinstance(error, UserError):
        raise error
    is_transient = any(kind.__name__ in TRANSIENT for kind in type(error).__mro__)
    if not is_transient or failures == NUM_RETRIES:
        advice = "; the same command continues" if is_transient else ""
        raise UserError(f"{what} cannot be loaded: {type(error).__name__}: {error}{advice}") from error
    time.sleep(RETRY_SECONDS * 2**failures)


def _bounded(records: Iterator[dict], wanted: Wanted) -> Iterator[list[tuple[Any, int]]]:
    """Yield (value, size) of records, in lists of at most `batch_bytes` and one record."""
    group: list[tuple[Any, int]] = []
    total = 0
    for record in records:
        beside = {key: drop_nulls(record.get(name)) for key, name in wanted.beside.items()}
        value = wanted.combine(drop_nulls(record.get(wanted.column)), beside)
        size = _count_bytes(value, wanted)
        group.append((value, size))
        total += size
        if total >= wanted.batch_bytes or len(group) == wanted.batch_records:
            yield group
            group, total = [], 0
    if group:
        yield group


def _count_bytes(value: Any, wanted: Wanted) -> int:
    """Return about how many bytes a record has; spelling pictures out as text would take long."""
    if wanted.images_column is not None:
        return count_value_bytes(value)
    return len(value) if isinstance(value, str) else len(repr(value))


def _identify(name: str) -> dict[str, Any]:
    """Return what identifies a file: a hub file's name, which contains the commit; of a local file the content too."""
    path = Path(name)
    if not path.is_file():
        return {"name": name}
    size = path.stat().st_size
    return {"name": name, "bytes": size, "sample_sha256": sample_sha256(path, size)}


def _open(
    dataset: str, subset: str | None, split: str, revision: str | None, with_images: bool
) -> tuple[IterableDataset, list[str]]:
    """Open the dataset as a stream, and list its files where the builder names them.

    with_images: pictures come as their files, not decoded.
    """
    builder = load_dataset_builder(dataset, subset, revision=revision)
    streams: Any = builder.as_streaming_dataset()
    if split not in streams:
        raise UserError(f"the dataset {dataset} has no split {split!r} but {', '.join(streams)}: set input.split")
    data_files = builder.config.data_files or {}
    stream = streams[split].decode(False) if with_images else streams[split]
    return stream, [str(file) for file in data_files.get(split, [])]


# One dataset is enough, as all parts of a worker are of the same; listing the files of a large one takes long.
_open_once = lru_cache(maxsize=1)(_open)
