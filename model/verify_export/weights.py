"""Checks the tensors of an export and of its adapter. Headers are read first, values as a stream."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from conf.schema import ModelConfig
from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from model.convert.hf_target import DTYPE_WORDS
from model.convert.mapping import NLD, build_tensor_table
from model.convert.safetensors_reader import (
    DTYPES,
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsReader,
    TensorRecord,
    read_header,
    some,
)
from model.export.adapter_weights import WEIGHTS_FILE, find_stored_names
from model.export.draft_adapter import ADAPTER_FOLDER, CONFIG_FILE, check_adapter
from model.verify_export.check import ExportCheck

Records = dict[str, TensorRecord]
CHUNK_BYTES = 4 * 2**20
PER_LAYER, BESIDE_LAYERS = 9, 3
BESIDE_VISION_LAYERS = 6  # of a model that reads images: its tower has as many tensors in a layer
MOST_MISSING = 1000  # tensors; beyond this none are listed, since config.json can name any number of layers
FILES = "weight files"
ADAPTER_FORMAT = "F32"  # of released adapters
SILENCE = "software that loads it skips unknown names and invents missing tensors, often silently"


def check_weight_files(directory: Path) -> tuple[ExportCheck, Records | None]:
    """Check that the files match their headers and the index, and hold nothing twice; return the records, too."""
    try:
        with SafetensorsReader(directory) as reader:
            records = reader.records
        return _check_files(directory, records), records
    except UserError as error:
        return ExportCheck.failed(FILES, str(error)), None


def _check_files(directory: Path, records: Records) -> ExportCheck:
    """Compare files with index. Raises: UserError if a file is damaged."""
    paths, index = _weight_files(directory), directory / INDEX_NAME
    if index.is_file() and (directory / SINGLE_NAME).is_file():
        return ExportCheck.failed(
            FILES, f"{SINGLE_NAME} and {INDEX_NAME} are both there", "remove one: programs differ in which they read"
        )
    if unused := [path.name for path in paths if path not in {record.path for record in records.values()}]:
        return ExportCheck.failed(
            FILES, f"not named by {INDEX_NAME}: {some(unused)}", "remove them, or fetch the index again"
        )
    copies = Counter(record.name for path in paths for record in read_header(path))
    if twice := [name for name, count in copies.items() if count > 1]:
        return ExportCheck.failed(
            FILES, f"in several shards: {some(twice)}", "fetch the shards again: it is undefined which one counts"
        )
    total = sum(record.end - record.begin for record in records.values())
    declared = _declared_bytes(index)
    if declared not in (None, total):
        detail = f"{INDEX_NAME} says total_size {declared}, the tensors have {total} bytes"
        return ExportCheck.warned(FILES, detail, "other software may plan memory with it: write the index again")
    return ExportCheck.passed(FILES, f"{len(paths)} with {total / 1e9:.3f} GB of tensors")


def _declared_bytes(index: Path) -> Any:
    metadata = read_json_object(index, "").get("metadata") if index.is_file() else None
    return metadata.get("total_size") if isinstance(metadata, dict) else None


def _weight_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def expected_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of the format: 9 per layer and 3 more, and those of a vision tower."""
    return {NLD.name(suffix): shape for entry in build_tensor_table(model) for suffix, shape in entry.hf.items()}


def _count(model: ModelConfig) -> tuple[int, str]:
    """Return the number of tensors, and how it comes about."""
    number, text = PER_LAYER * model.num_layers + BESIDE_LAYERS, f"{PER_LAYER} x {model.num_layers} + {BESIDE_LAYERS}"
    if model.vision is None:
        return number, text
    vision = f"{PER_LAYER} x {model.vision.num_layers} + {BESIDE_VISION_LAYERS} of the vision tower and projector"
    return number + PER_LAYER * model.vision.num_layers + BESIDE_VISION_LAYERS, f"{text} + {vision}"


def _lacks_most(records: Records, model: ModelConfig) -> bool:
    return _count(model)[0] - len(records) > MOST_MISSING


def check_names(records: Records, model: ModelConfig) -> ExportCheck:
    """Check that there are exactly the tensors of the format: 9 * layers + 3, and those of a vision tower."""
    name = "tensor names"
    if _lacks_most(records, model):
        layers = model.num_layers + (model.vision.num_layers if model.vision else 0)
        detail = f"config.json has {layers} layers, the weights {len(records)} tensors"
        return ExportCheck.failed(name, detail, "config.json or the weights belong to another model: fetch both again")
    expected = expected_shapes(model)
    missing, extra = sorted(expected.keys() - records.keys()), sorted(records.keys() - expected.keys())
    groups = ((f"{len(missing)} missing", missing), (f"{len(extra)} unknown", extra))
    if problems := [f"{what}: {some(found)}" for what, found in groups if found]:
        return ExportCheck.failed(name, "; ".join(problems), f"export or fetch it again: {SILENCE}")
    return ExportCheck.passed(name, f"{len(records)} = {_count(model)[1]}, none missing, none unknown")


def check_shapes(records: Records, model: ModelConfig) -> ExportCheck:
    """Check that shapes are those of config.json."""
    name = "tensor shapes"
    if _lacks_most(records, model):
        return ExportCheck.skipped(name, "most tensors are missing")
    expected = expected_shapes(model)
    wrong = [
        f"{tensor} is {list(records[tensor].shape)}, not {list(shape)}"
        for tensor, shape in expected.items()
        if tensor in records and records[tensor].shape != shape
    ]
    if wrong:
        return ExportCheck.failed(
            name, some(wrong, 3), "config.json or the weights belong to another model: fetch both again"
        )
    parameters = sum(math.prod(shape) for shape in expected.values())
    return ExportCheck.passed(name, f"as in config.json: {parameters:,} parameters")


def check_dtypes(records: Records, config: dict[str, Any]) -> ExportCheck:
    """Check that there is one number format, the one in config.json; the releases have bf16."""
    name = "tensor formats"
    found = Counter(record.dtype for record in records.values())
    if unknown := [record.name for record in records.values() if record.dtype not in DTYPES]:
        return ExportCheck.failed(
            name, f"{some(unknown, 3)} in {records[unknown[0]].dtype}", "the format has bf16 or fp32 weights"
        )
    if len(found) > 1:
        counts = ", ".join(f"{count} in {word}" for word, count in found.most_common())
        return ExportCheck.warned(name, counts, "loading rounds them all to one format: export again with --dtype")
    stored = DTYPES[next(iter(found))] if found else None
    declared = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    if stored is not None and DTYPE_WORDS.get(stored) != declared:
        detail = f"the tensors are {next(iter(found))}, but config.json says {declared}"
        return ExportCheck.warned(name, detail, "loading converts them to that: correct config.json")
    return ExportCheck.passed(name, f"all {next(iter(found), 'none')}, as in config.json")


def check_values(files: list[Path]) -> ExportCheck:
    """Check that no tensor of `files` holds infinity or NaN. Memory: a few times CHUNK_BYTES."""
    name = "values"
    try:
        records = [record for path in files for record in read_header(path)]
        wrong = [record.name for record in records if record.dtype in DTYPES and not _is_finite(record)]
    except UserError as error:
        return ExportCheck.failed(name, str(error))
    if unread := [record.name for record in records if record.dtype not in DTYPES]:
        return ExportCheck.skipped(name, f"unknown format: {some(unread)}")
    if wrong:
        return ExportCheck.failed(
            name, f"not finite: {some(wrong)}", "training diverged or the file is damaged: export again"
        )
    return ExportCheck.passed(name, f"all finite in {len(records)} tensors")


def _is_finite(record: TensorRecord) -> bool:
    dtype, left = DTYPES[record.dtype], record.end - record.begin
    with open(record.path, "rb") as file:
        file.seek(record.begin)
        while left:
            chunk = bytearray(min(left, CHUNK_BYTES))
            if file.readinto(chunk) != len(chunk):
                raise UserError(f"{record.path} became shorter while it was read: tensor {record.name} is cut off")
            if not bool(torch.frombuffer(chunk, dtype=dtype).isfinite().all()):
                return False
            left -= len(chunk)
    return True


def check_draft_adapter(directory: Path, folder: str, config: dict[str, Any]) -> ExportCheck:
    """Check that the adapter in `folder` fits the checkpoint: a LoRA on every o_proj, names, shapes and rank."""
    name = f"adapter {folder}"
    try:
        check_adapter(directory / folder, SimpleNamespace(**config))
        renamed = {name: stored for name, stored in find_stored_names(directory / folder).items() if name != stored}
        records = read_header(directory / folder / WEIGHTS_FILE)
        values = read_json_object(directory / folder / CONFIG_FILE, "")
    except UserError as error:
        return ExportCheck.failed(name, str(error))
    if renamed:
        name_of, stored = next(iter(sorted(renamed.items())))
        detail = f"PEFT finds no module for {some(renamed.values())} and would change nothing"
        return ExportCheck.failed(name, detail, f"rename its tensors: {stored} is {name_of}")
    if folder != ADAPTER_FOLDER:
        detail = f"it fits, but decoding looks in {ADAPTER_FOLDER}/"
        return ExportCheck.warned(name, detail, f"rename it to {ADAPTER_FOLDER}")
    if other := sorted({record.dtype for record in records} - {ADAPTER_FORMAT}):
        detail = f"its weights are {', '.join(other)}"
        return ExportCheck.warned(name, detail, "the format has fp32: train or save it again")
    scale = f"rank {values['r']}, alpha {values.get('lora_alpha')}"
    return ExportCheck.passed(name, f"{len(records)} tensors = 2 x {config['num_hidden_layers']}, {scale}")
