"""Rows of a dataset of the Hugging Face hub (or a folder that `datasets` can load), as they stream."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from datasets import IterableDataset, load_dataset_builder

from conf.errors import UserError
from data_pipeline.prepare.inputs import sample_sha256
from data_pipeline.prepare.parquet import LARGEST_BATCH_ROWS
from data_pipeline.prepare.readers import RowBatch, Wanted

if TYPE_CHECKING:
    from data_pipeline.prepare.plan import Part

COMMIT = re.compile(r"@([0-9a-f]{40})/")


def plan_hub(input_: Any, column: str) -> tuple[list[dict], list[dict]]:
    """Inputs and parts (see plan.Plan) of `conf.schema.InputConfig`: one part per shard of the hub's files.

    The commit that the revision names now is kept, so that all workers read the same. Raises UserError if the dataset
    cannot be loaded or has no such column.
    """
    options = {name: getattr(input_, name) for name in ("dataset", "subset", "split", "revision")}
    dataset, files = _open(options)
    commits = {match for file in files for match in COMMIT.findall(file)}
    if len(commits) == 1:
        options["revision"] = commits.pop()
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if column not in columns:
        raise UserError(
            f"the dataset {input_.dataset} has no column {column!r} but {', '.join(columns) or 'none'}: "
            "set input.column"
        )
    inputs = [_identify(name) for name in files or [f"{input_.dataset}@{options['revision']}"]]
    names = files if len(files) == dataset.num_shards else [""] * dataset.num_shards
    parts = [
        {
            "reader": "hub",
            "name": name or f"{input_.dataset}:{input_.split}:{shard}",
            "path": name or f"{input_.dataset}, split {input_.split}, shard {shard}",
            "start": shard,
            "end": dataset.num_shards,
            "first_row": 0,
            "size": 0,
            "options": options,
        }
        for shard, name in enumerate(names)
    ]
    return inputs, parts


def read_hub(part: "Part", wanted: Wanted, skip: int) -> Iterator[RowBatch]:
    """Rows of one shard from row `skip` on."""
    dataset, _ = _open(part.options)
    # A column that later files lack must be seen as such, so the rows are whole.
    shard = dataset.shard(num_shards=part.end, index=part.start)
    rows = iter(shard.skip(skip) if skip else shard)
    end = skip
    for group in _bounded(rows, wanted):
        numbers = [end + i for i in range(len(group)) if wanted.selection.takes(end + i)]
        values = [group[number - end][0] for number in numbers]
        end += len(group)
        yield RowBatch(numbers, values, end, sum(size for _, size in group), 0)


def _bounded(rows: Iterator[dict], wanted: Wanted) -> Iterator[list[tuple[Any, int]]]:
    """(value, size) of rows, in lists of at most `batch_bytes` and one row."""
    group: list[tuple[Any, int]] = []
    total = 0
    for row in rows:
        value = row.get(wanted.column)
        size = len(value) if isinstance(value, str) else len(orjson.dumps(value, default=str))
        group.append((value, size))
        total += size
        if total >= wanted.batch_bytes or len(group) == LARGEST_BATCH_ROWS:
            yield group
            group, total = [], 0
    if group:
        yield group


def _identify(name: str) -> dict[str, Any]:
    """A hub file's name contains the commit; a local file can change under its name."""
    path = Path(name)
    if not path.is_file():
        return {"name": name}
    size = path.stat().st_size
    return {"name": name, "bytes": size, "sample_sha256": sample_sha256(path, size)}


def _open(options: dict[str, Any]) -> tuple[IterableDataset, list[str]]:
    """The dataset as a stream, and its files where the builder names them."""
    name, split = options["dataset"], options["split"]
    try:
        builder = load_dataset_builder(name, options["subset"], revision=options["revision"])
        streams: Any = builder.as_streaming_dataset()
        if split not in streams:
            raise UserError(f"the dataset {name} has no split {split!r} but {', '.join(streams)}: set input.split")
        data_files = builder.config.data_files or {}
        return streams[split], [str(file) for file in data_files.get(split, [])]
    except UserError:
        raise
    except Exception as error:  # the library and its file systems raise many kinds
        raise UserError(
            f"the dataset {name} (subset {options['subset']}, revision {options['revision']}) cannot be loaded: {error}"
        ) from error
