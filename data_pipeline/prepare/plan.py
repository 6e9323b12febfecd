"""Cut a source into parts, units of work that are the same whoever does them and in whatever order; and read a part.

A plain .jsonl is cut at line ends into ranges of about `shard_bytes`, a parquet file between row groups, a saved
dataset by records; each such part becomes one shard. A compressed .jsonl and a shard of a hub dataset can only be read
from the beginning: each is one part, whose worker starts a new shard after every `shard_bytes` of text.

The readers of parquet, saved and hub datasets import libraries that take seconds to load, so each is imported only
where its format is met: a worker of .jsonl files must start fast.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.prepare.inputs import InputFile, is_saved_dataset, list_input_files
from data_pipeline.prepare.jsonl import plan_lines, read_range, read_stream, reading
from data_pipeline.prepare.part import Part, RecordBatch, SourcePlan, Wanted


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
        plan = _plan_files(input_.files, column, shard_bytes)
    return replace(plan, parts=[replace(part, number=number) for number, part in enumerate(plan.parts)])


def read_records(part: Part, wanted: Wanted, skip: int) -> Iterator[RecordBatch]:
    """Yield batches of the records of `part` from number `skip` on.

    Raises UserError naming the input if it cannot be read or is not what its name says.
    """
    with reading(part.path):
        yield from _read(part, wanted, skip)


def _plan_files(files: str, column: str, shard_bytes: int) -> SourcePlan:
    found = list_input_files(files)
    parts = [part for file in found if file.size for part in _plan_file(file, column, shard_bytes)]
    inputs = [{"name": file.name, "bytes": file.size, "sample_sha256": file.sample_sha256} for file in found]
    return SourcePlan(parts, inputs, [str(file.path) for file in found if not file.size])


def _plan_file(file: InputFile, column: str, shard_bytes: int) -> Iterator[Part]:
    if file.suffix == ".parquet":
        from data_pipeline.prepare.parquet import plan_row_groups

        return plan_row_groups(file, column, shard_bytes)
    return plan_lines(file, column, shard_bytes)


def _read(part: Part, wanted: Wanted, skip: int) -> Iterator[RecordBatch]:
    if part.reader == "jsonl":
        return read_range(part, wanted)
    if part.reader == "stream":
        return read_stream(part, wanted, skip)
    if part.reader == "parquet":
        from data_pipeline.prepare.parquet import read_row_groups

        return read_row_groups(part, wanted)
    if part.reader == "saved":
        from data_pipeline.prepare.saved import read_saved

        return read_saved(part, wanted)
    from data_pipeline.prepare.hub import read_hub

    return read_hub(part, wanted, skip)
