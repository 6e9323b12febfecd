"""Prepare sources, from inputs to finished datasets: plan, tokenise what is not there yet, finish."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import DataConfig, InputConfig, SourceConfig, Split
from conf.system.errors import UserError
from conf.tokenizer_info import read_tokenizer_info
from data_pipeline.encoder import RecordEncoder
from data_pipeline.prepare import finish
from data_pipeline.prepare.console import SourceProgress, SourceReport
from data_pipeline.prepare.identity import begin, lock_directory
from data_pipeline.prepare.inputs import list_left_out, list_surprises
from data_pipeline.prepare.part import SELECTION_VERSION, Part, Selection, SourcePlan
from data_pipeline.prepare.plan import images_column_of, plan_source, suffixes_of
from data_pipeline.prepare.pool import WorkerPool, num_cores
from data_pipeline.prepare.shards import CompleteShard, Job, TokenizeTask, check_files, load_complete_shards
from data_pipeline.storage.checks import check_shard_files
from data_pipeline.storage.index_file import choose_dtype
from data_pipeline.storage.manifest import FORMAT_VERSION, DatasetManifest, load_manifest, manifest_path, save_manifest

NAMES_SHOWN = 5
DEFAULT_COLUMNS = {"text": "text", "chat": "messages", "image_chat": "messages"}


def prepare_source(name: str, source: SourceConfig, data: DataConfig) -> DatasetManifest:
    """Make the dataset at `source.path` from `source.input`, unless it is there already.

    name: of the source in messages. data: holds the tokenizer, the mask token and `prepare`.
    Raises UserError: inputs or tokenizer that cannot be used, too many unusable records, a path that holds something
    else, a disk that is full. Complete shards then stay, and the same call continues.
    """
    return report_source(name, source, data).manifest


def prepare_sources(data: DataConfig) -> list[SourceReport]:
    """Prepare every source of data.train and data.heldout that has an `input`, each path once.

    Raises UserError as prepare_source does, when no source has an input, and when two give one path other inputs.
    """
    chosen: dict[str, tuple[str, SourceConfig]] = {}
    for name, source in _named_sources(data):
        if source.input is None:
            continue
        former = chosen.setdefault(str(Path(source.path)), (name, source))
        if former[1].input != source.input:
            raise UserError(f"{former[0]} and {name} have the same path {source.path} but other inputs: give two paths")
    if not chosen:
        raise UserError("no source of data.train or data.heldout has an input: there is nothing to prepare")
    return [report_source(name, source, data) for name, source in chosen.values()]


def report_source(name: str, source: SourceConfig, data: DataConfig) -> SourceReport:
    """Do as prepare_source, and report what was done."""
    with _explaining(name, Path(source.path)), lock_directory(Path(source.path)):
        return _Preparation(name, source, data).run()


def _named_sources(data: DataConfig) -> Iterator[tuple[str, SourceConfig]]:
    for part in ("heldout", "train"):  # held-out first: too few records for it are found out before the long work
        for name, source in (getattr(data, part) or {}).items():
            yield f"data.{part}.{name}", source


@contextmanager
def _explaining(name: str, directory: Path) -> Iterator[None]:
    """Name the source in the messages of errors."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{name}: {error}") from error
    except OSError as error:
        raise UserError(f"{name}: {error.filename or directory}: {error.strerror}") from error


class _Preparation:
    """Prepare one source."""

    def __init__(self, name: str, source: SourceConfig, data: DataConfig) -> None:
        self._name, self._data, self._directory = name, data, Path(source.path)
        self._input = _check_input(source.input)
        self._check_settings()
        tokenizer_dir = Path(data.tokenizer)
        info = read_tokenizer_info(tokenizer_dir, data.mask_token)
        kind, template = self._input.kind.value, data.prepare.chat_template
        self._fingerprint = info.fingerprint
        self._job = Job(
            directory=self._directory,
            kind=kind,
            tokenizer_dir=tokenizer_dir,
            mask_token=data.mask_token,
            chat_template=template,
            column=self._input.column or DEFAULT_COLUMNS[kind],
            images_column=images_column_of(self._input),
            selection=Selection(self._input.records.value, data.prepare.heldout_every),
            shard_bytes=int(data.prepare.shard_bytes),
            dtype=choose_dtype(info.vocab_size),
        )
        self._encoder: RecordEncoder = self._job.build_encoder()

    def run(self) -> SourceReport:
        """Prepare the source; the caller has locked the directory."""
        plan = plan_source(self._input, self._job.column, self._job.shard_bytes)
        begin(self._directory, self._identity(plan) | self._former_selection())
        if manifest_path(self._directory).exists():
            return self._up_to_date(plan)
        finish.remove_leftovers(self._directory, keep_notes=True)
        try:
            seconds, tokens = self._tokenize(plan)
        finally:
            finish.remove_leftovers(self._directory, keep_notes=True)
        manifest = self._finish(plan)
        finish.remove_leftovers(self._directory, keep_notes=False)
        return self._report(plan, manifest, seconds, tokens / seconds)

    def _check_settings(self) -> None:
        settings = self._data.prepare
        rules = {
            "workers": settings.workers >= 0,
            "shard_bytes": 1 <= settings.shard_bytes < float("inf"),
            "heldout_every": settings.heldout_every >= 2 or self._input.records is Split.all,
            "max_skipped_share": 0 <= settings.max_skipped_share <= 1,
        }
        for key, holds in rules.items():
            if not holds:
                raise UserError(f"data.prepare.{key}={getattr(settings, key)} is out of range")

    def _settings(self) -> dict[str, Any]:
        """Return everything but inputs and tokenizer that decides which tokens there are and in which shards."""
        job = self._job
        settings: dict[str, Any] = {"column": job.column, "rows": job.selection.records}
        if job.images_column is not None:
            settings["images"] = job.images_column
        if job.selection.records != "all":
            settings |= {"heldout_every": job.selection.every, "selection": SELECTION_VERSION}
        for key in ("dataset", "subset", "split") if self._input.dataset else ():
            settings[key] = getattr(self._input, key)
        return settings | {
            "shard_bytes": job.shard_bytes,
            "mask_token": job.mask_token,
            "encoder": self._encoder.settings(),
        }

    def _former_selection(self) -> dict[str, Any]:
        """Return the rule by which the records of a finished dataset were selected, which stays its own."""
        if self._job.selection.records == "all" or not manifest_path(self._directory).exists():
            return {}
        return {"selection": load_manifest(self._directory).settings.get("selection")}

    def _identity(self, plan: SourcePlan) -> dict[str, Any]:
        header = {"format_version": FORMAT_VERSION, "kind": self._job.kind, "tokenizer_fingerprint": self._fingerprint}
        return header | self._settings() | {"inputs": plan.inputs}

    def _up_to_date(self, plan: SourcePlan) -> SourceReport:
        finish.remove_leftovers(self._directory, keep_notes=False)
        manifest = load_manifest(self._directory)
        for shard in manifest.shards:
            check_shard_files(self._directory, shard, manifest.dtype)
        skipped, records = sum(manifest.source["skipped"].values()), manifest.source["num_rows"]
        if skipped:
            share, path = self._data.prepare.max_skipped_share, self._directory / finish.SKIPPED_NAME
            finish.refuse_skipped(skipped, records, share, path)
        return self._report(plan, manifest, 0.0, 0.0)

    def _tokenize(self, plan: SourcePlan) -> tuple[float, int]:
        """Do the parts that are not done. Return the seconds it took and the tokens made."""
        complete = {part.number: self._load_complete_shards(part) for part in plan.parts}
        todo = [part for part in plan.parts if not (complete[part.number] and complete[part.number][-1].is_last)]
        done = [shard for shards in complete.values() for shard in shards]
        sizes = [part.size for part in plan.parts]
        total = sum(sizes) if all(sizes) else 0
        workers = self._data.prepare.workers or num_cores()
        progress = SourceProgress(self._name, total, sum(shard.progress for shard in done))
        with progress, WorkerPool(self._job, workers) as pool:
            tasks = [_task(part, complete[part.number]) for part in todo]
            pool.run(tasks, lambda step: progress.advance(step.progress, step.tokens, step.skipped))
        return progress.seconds, progress.tokens

    def _load_complete_shards(self, part: Part) -> list[CompleteShard]:
        shards = load_complete_shards(self._directory, part.number)
        itemsize = np.dtype(self._job.dtype).itemsize
        for shard in shards:
            check_files(self._directory / shard.name, shard.contents.documents, shard.contents.tokens, itemsize)
        return shards

    def _finish(self, plan: SourcePlan) -> DatasetManifest:
        located = finish.locate_shards(self._directory, plan.parts)
        skipped: Counter[str] = Counter()
        for item in located:
            skipped.update(item.shard.skipped)
        records = sum(item.shard.num_records for item in located)
        path = finish.write_skipped(self._directory, located)
        if path:
            finish.refuse_skipped(sum(skipped.values()), records, self._data.prepare.max_skipped_share, path)
        if not any(item.shard.contents.documents for item in located):
            raise UserError(self._no_document(records))
        inputs = {"inputs": plan.inputs, "num_rows": records, "skipped": dict(sorted(skipped.items()))}
        manifest = DatasetManifest(
            kind=self._job.kind,
            dtype=self._job.dtype,
            tokenizer_fingerprint=self._fingerprint,
            block_padding_token_id=self._encoder.block_padding_token_id,
            source=_describe_input(self._input) | inputs,
            settings=self._settings(),
            shards=finish.write_shard_manifests(self._directory, located),
        )
        save_manifest(self._directory, manifest)
        return manifest

    def _no_document(self, records: int) -> str:
        where, selection = self._input.files or self._input.dataset, self._job.selection
        if records or selection.records == "all":
            return f"{where} holds no document"
        if selection.records == "train":
            return (
                f"every record of {where} was held out (copies of a record are on one side), or it holds none: give "
                "more records"
            )
        return (
            f"no record of {where} was selected as held-out, which is about one in {selection.every}: lower "
            "data.prepare.heldout_every, give more records, or hold nothing out (data.heldout=null)"
        )

    def _report(self, plan: SourcePlan, manifest: DatasetManifest, seconds: float, rate: float) -> SourceReport:
        warnings = [f"{path} is empty" for path in plan.empty_inputs]
        if left_out := list_left_out(self._input.files, suffixes_of(self._input)) if self._input.files else []:
            more = ", ..." if len(left_out) > NAMES_SHOWN else ""
            warnings.append(f"{len(left_out)} files are not read: {', '.join(left_out[:NAMES_SHOWN])}{more}")
        warnings += list_surprises(self._input.files) if self._input.files else []
        if self._job.images_column and not manifest.images:
            warnings.append(f"no record has an image, neither in its messages nor in column {self._job.images_column}")
        return SourceReport(self._name, self._directory, manifest, manifest.source["skipped"], seconds, rate, warnings)


def _check_input(input_: InputConfig | None) -> InputConfig:
    if input_ is None:
        raise UserError("the source has no input: there is nothing to prepare it from")
    if (input_.files is None) == (input_.dataset is None):
        raise UserError("give either input.files or input.dataset, not both")
    return input_


def _task(part: Part, complete: list[CompleteShard]) -> TokenizeTask:
    """Return the task to do what is left of a part."""
    return TokenizeTask(part, len(complete), complete[-1].end_record if complete else 0)


def _describe_input(input_: InputConfig) -> dict[str, Any]:
    """Return the input as JSON values, under the keys that manifests have had from the first version on."""
    plain = {key: value.value if isinstance(value, Enum) else value for key, value in asdict(input_).items()}
    if plain["images"] is None:  # as in manifests of texts
        del plain["images"]
    return {"rows" if key == "records" else key: value for key, value in plain.items()}
