"""Cut a source into parts, units of work that are the same whoever does them and in whatever order; and read a part.

A plain .jsonl is cut at line ends into ranges of about `shard_bytes`, a parquet file between row groups, a saved
dataset by records; each such part becomes one shard. A compressed .jsonl and a shard of a hub dataset can only be read
from the beginning: each is one part, whose worker starts a new shard after every `shard_bytes` of text.

Image chats are handed on one by one, their pictures read: a part of them, in any format, starts a new shard after
every `shard_bytes` of pictures and text.

The readers of parquet, saved and hub datasets import libraries that take seconds to load, so each is imported only
where its format is met: a worker of .jsonl files must start fast.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.prepare.inputs import IMAGE_CHAT_SUFFIXES, SUFFIXES, InputFile, is_saved_dataset, list_input_files
from data_pipeline.prepare.jsonl import plan_lines, read_range, read_stream, reading
from data_pipeline.prepare.part import Part, RecordBatch, Selection, SourcePlan, Wanted

DEFAULT_IMAGES_COLUMN = "images"


def plan_source(input_: Any, column: str, shard_bytes: int) -> SourcePlan:
    """Return the parts and inputs of a source's `conf.schema.InputConfig`.

    Raises UserError: what list_input_files raises, a column that the data do not have, a file that is not what its
    name says, a dataset that cannot be loaded.
    """
    if input_.dataset is not None:
        from data_pipeline.prepare.hub import plan_hub

        plan = plan_hub(input_, column)
    elif is_saved_dataset(path := Path(input_.files).expanduser()):
        from data_pipeline.prepare.saved import plan_saved

        plan = plan_saved(path, input_.split, column, shard_bytes)
    else:
        plan = _plan_files(input_, column, shard_bytes)
    return replace(plan, parts=[replace(part, number=number) for number, part in enumerate(plan.parts)])


def read_records(part: Part, wanted: Wanted, skip: int) -> Iterator[RecordBatch]:
    """Yield batches of the records of `part` from number `skip` on.

    Raises UserError naming the input if it cannot be read or is not what its name says.
    """
    with reading(part.path):
        if wanted.images_column is None:
            yield from _read(part, wanted, skip)
            return
        from data_pipeline.prepare.pictured import read_pictured

        everything = replace(wanted, selection=Selection("all", wanted.selection.every))  # pictures decide as well
        batches = _read(part, everything, skip if part.is_stream else 0)
        yield from read_pictured(batches, part, wanted.selection, skip)


def _plan_files(input_: Any, column: str, shard_bytes: int) -> SourcePlan:
    images = images_column_of(input_)
    found = list_input_files(input_.files, suffixes_of(input_))
    parts = [part for file in found if file.size for part in _plan_file(file, column, shard_bytes, images)]
    inputs = [{"name": file.name, "bytes": file.size, "sample_sha256": file.sample_sha256} for file in found]
    return SourcePlan(parts, inputs, [str(file.path) for file in found if not file.size])


def suffixes_of(input_: Any) -> tuple[str, ...]:
    """Return the suffixes of files that are read for a source's `conf.schema.InputConfig`."""
    return IMAGE_CHAT_SUFFIXES if images_column_of(input_) else SUFFIXES


def images_column_of(input_: Any) -> str | None:
    """Return the column of pictures beside the messages of a source's `conf.schema.InputConfig`; None: no images."""
    return (input_.images or DEFAULT_IMAGES_COLUMN) if input_.kind.value == "image_chat" else None


def _plan_file(file: InputFile, column: str, shard_bytes: int, images: str | None) -> Iterator[Part]:
    if file.suffix == ".tar":
        from data_pipeline.prepare.tar import plan_tar

        return plan_tar(file)
    if file.suffix == ".parquet":
        from data_pipeline.prepare.parquet import plan_row_groups

        return plan_row_groups(file, column, shard_bytes, images)
    return plan_lines(file, column, shard_bytes)


def _read(part: Part, wanted: Wanted, skip: int) -> Iterator[RecordBatch]:
    if part.reader == "jsonl":
        return read_range(part, wanted)
    if part.reader == "stream":
        return read_stream(part, wanted, skip)
    if part.reader == "parquet":
        from data_pipeline.prepare.parquet import read_row_groups

        return read_row_groups(part, wanted)
    if part.reader == "tar":
        from data_pipeline.prepare.tar import read_tar

        return read_tar(part, wanted, skip)
    if part.reader == "saved":
        from data_pipeline.prepare.saved import read_saved

        return read_saved(part, wanted)
    from data_pipeline.prepare.hub import read_hub

    return read_hub(part, wanted, skip)
