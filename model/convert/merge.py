"""Gives a text model a vision tower: one export with images from two checkpoints, tensor by tensor.

Text model and head come from the one, tower and projector from a Ministral 3 checkpoint with vision. Every tensor of
both is used or counted. Values stay what they are, rounded where the target's format is narrower.

Three rows of the embedding are not the text model's: those of `<|image_pad|>`, `<|image_break|>` and `<|image_end|>`
begin with Ministral 3's trained [IMG], [IMG_BREAK] and [IMG_END], beside which its tower was trained. A text model
never reads these rows.
"""

from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from conf.schema import ModelConfig, VisionConfig
from conf.system.atomic import atomic_directory
from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from model.checkpoint.checksums import write_sums
from model.convert import hf_target
from model.convert.checkpoint_info import read_hf_checkpoint_info
from model.convert.conversion import Converted, build_import_manifest, verify_written_export
from model.convert.hf_source import HfSource
from model.convert.image_vocabulary import find_trained_embeddings, name_image_tokens
from model.convert.mapping import (
    EMBEDDING,
    VISION_PARTS,
    TensorEntry,
    build_tensor_table,
    count_table_parameters,
    list_vision_entries,
)
from model.convert.nld_config import get_model_type
from model.convert.progress import Progress
from model.convert.safetensors_reader import DTYPES, SafetensorsReader, some
from model.convert.safetensors_writer import SafetensorsWriter
from model.convert.vision_config import read_vision_config
from model.export.shipped_code import CONFIG_NAME


class VisionSource:
    """Tower and projector of a checked Ministral 3 directory. Use it as a context manager.

    Attributes:
        vision: the tower's dimensions.
        num_skipped: tensors of its text model, and what belongs to their formats.
        trained: embedding [hidden] that an image token of ours begins with, by its id; {} if it names no such tokens.

    Raises:
        UserError: it has no tower or no projector, or one that is not what its config.json says.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        path = directory / CONFIG_NAME
        values = read_json_object(path, f"{directory} has no {CONFIG_NAME}: give a Ministral 3 directory")
        if (kind := values.get("model_type")) != "mistral3":
            raise UserError(
                f"{directory} has model_type {kind!r}: give a Ministral 3 checkpoint with its vision tower (mistral3), "
                "such as Ministral-3-8B-Instruct-2512"
            )
        self.vision: VisionConfig = read_vision_config(values, path)
        with HfSource(directory) as text:  # accounts for every tensor that is none of the tower's
            self.hidden_size = text.config.model.hidden_size
            self.trained = _read_trained_embeddings(text, directory)
            self._prefix = text.spelling.vision
        self._reader = SafetensorsReader(directory)
        self.entries = list(list_vision_entries(replace(text.config.model, vision=self.vision)))
        self._check()
        self.num_skipped = len(self._reader.records) - len(self.entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._reader.__exit__(kind, error, trace)

    def read(self, entry: TensorEntry) -> Tensor:
        """Return the tensor of `entry` in the file's format."""
        (suffix,) = entry.hf
        return self._reader.read(self._prefix + suffix)

    def _check(self) -> None:
        records = {name: record for name, record in self._reader.records.items() if self._is_vision(name)}
        shapes = {self._prefix + suffix: shape for entry in self.entries for suffix, shape in entry.hf.items()}
        missing, extra = sorted(shapes.keys() - records.keys()), sorted(records.keys() - shapes.keys())
        if missing or extra:
            problem = f"lacks {some(missing, 3)}" if missing else f"has {some(extra, 3)}"
            raise UserError(
                f"{self._directory} {problem} of vision tower and projector, unlike its config.json: download it again"
            )
        for name, shape in shapes.items():
            record = records[name]
            if record.shape != shape or record.dtype not in DTYPES:
                raise UserError(
                    f"{self._directory}: tensor {name} is {record.dtype} {list(record.shape)}, but config.json makes "
                    f"it {list(shape)} (bf16 or fp32): one of the two files belongs to another model"
                )

    def _is_vision(self, name: str) -> bool:
        return name.removeprefix("model.").startswith(tuple(VISION_PARTS))


def _read_trained_embeddings(text: HfSource, directory: Path) -> dict[int, Tensor]:
    sources = find_trained_embeddings(directory)
    if not sources:
        return {}
    embedding = text.read(next(entry for entry in text.table if EMBEDDING in entry.hf))
    return {token_id: embedding[row].clone() for token_id, row in sources.items()}


def merge_checkpoints(
    text_dir: Path,
    vision_dir: Path,
    target: Path,
    mask_token: str,
    progress: Progress,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int,
    replace_target: bool = False,
) -> Converted:
    """Write an export with images: text model and head of one directory, tower and projector of another.

    Args:
        text_dir: tri-mode export or Ministral 3 checkpoint; its tokenizer becomes the export's, with names for images.
        vision_dir: Ministral 3 checkpoint with vision.
        target: directory to create.
        mask_token: text of the mask token.
        progress: follows the bytes.
        dtype: number format of the exported weights.
        max_shard_bytes: most tensor bytes per file, unless one tensor is larger.
        replace_target: replace what is at `target`.

    Raises:
        UserError: one of the two is incomplete, they do not fit, or the text model reads images already; nothing has
            been written then.
    """
    info = read_hf_checkpoint_info(text_dir, mask_token)
    if info.model.vision is not None:
        raise UserError(f"{text_dir} reads images already: leave --vision out, or give the text model it was made from")
    with HfSource(text_dir) as text, VisionSource(vision_dir) as vision:
        if vision.hidden_size != info.model.hidden_size:
            raise UserError(
                f"the projector of {vision_dir} makes features of {vision.hidden_size} numbers, the text model in "
                f"{text_dir} has hidden_size {info.model.hidden_size}: give a Ministral 3 checkpoint of the same size"
            )
        model = replace(info.model, vision=vision.vision)
        table = build_tensor_table(model)
        specs, parameters = hf_target.build_specs(table, dtype), count_table_parameters(table)
        progress.start(2 * parameters * dtype.itemsize)
        with atomic_directory(target, replace=replace_target) as partial:
            hf_target.copy_tokenizer_files(text_dir, partial)
            name_image_tokens(partial)
            hf_target.write_portable_tokenizer_config(partial)
            hf_target.copy_code(partial, get_model_type(model))
            manifest = build_import_manifest(replace(info, model=model), dtype)
            hf_target.write_config_files(partial, manifest, model, dtype)
            with SafetensorsWriter(partial, specs, max_shard_bytes) as writer:
                for entry in table:
                    tensor = vision.read(entry) if entry in vision.entries else _read_text(text, entry, vision, model)
                    hf_target.add_entry(writer, entry, tensor, model, dtype)
                    progress.advance("writing", tensor.numel() * dtype.itemsize)
                    del tensor  # before the next one is read
            verify_written_export(partial, specs, writer.checksums, progress)
            write_sums(partial)
        return Converted(len(specs), parameters, parameters * dtype.itemsize, text.num_skipped + vision.num_skipped)


def _read_text(text: HfSource, entry: TensorEntry, vision: VisionSource, model: ModelConfig) -> Tensor:
    """Read a tensor of the text model; the embedding with the trained rows of image tokens."""
    tensor = text.read(entry)
    for token_id, row in (vision.trained if EMBEDDING in entry.hf else {}).items():
        assert token_id < model.vocab_size
        tensor[token_id] = row.to(tensor.dtype)
    return tensor
