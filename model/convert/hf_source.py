"""Reads a Hugging Face checkpoint as Megatron tensors, assembled one at a time.

Opening it checks all names, shapes and formats before anything is written.
"""

from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from conf.system.errors import UserError
from model.convert.fp8 import dequantize_into, find_scales, is_activation_scale
from model.convert.hf_config import HfConfig, read_hf_config
from model.convert.mapping import (
    EMBEDDING,
    HEAD,
    MINISTRAL_SPELLINGS,
    NLD,
    VISION_PREFIXES,
    Spelling,
    TensorEntry,
    build_tensor_table,
    split_views,
)
from model.convert.safetensors_reader import DTYPES, SafetensorsReader, some


class HfSource:
    """A checked Hugging Face directory; `read(entry)` returns one Megatron tensor. Use it as a context manager.

    Attributes:
        config: the content of config.json.
        table: the tensors of its model.
        num_skipped: tensors of the image encoder, and factors of activations.
        dtype: the narrower of bf16 and fp32 that holds every tensor without loss (bf16 for the releases). Of 8-bit
            weights bf16, to which transformers dequantises them, too.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.config: HfConfig = read_hf_config(self.directory)
        self.table = build_tensor_table(self.config.model)
        self._reader = SafetensorsReader(self.directory)
        self.spelling = _find_spelling(self._reader, self.config, self.directory)
        records = self._reader.records
        self._scales = find_scales(records, self.config.fp8_block, self.directory) if self.config.is_fp8 else {}
        skipped = {name for name in records if name.startswith(VISION_PREFIXES)}
        if self.config.is_fp8:
            skipped |= {name for name in records if is_activation_scale(name)}
        self.num_skipped = len(skipped)
        self._check_names(records.keys() - skipped - {scale.name for scale in self._scales.values()})
        self._check_shapes()
        formats = {records[name].dtype for name in self._used_names() if name not in self._scales}
        self.dtype = torch.bfloat16 if formats <= {"BF16"} else torch.float32

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._reader.__exit__(kind, error, trace)

    @property
    def head_is_copied(self) -> bool:
        """Whether the checkpoint has no head of its own because the embedding serves as head."""
        return self.config.tied and self.spelling.head not in self._reader.records

    def read(self, entry: TensorEntry, dtype: torch.dtype | None = None) -> Tensor:
        """Return the Megatron tensor of `entry`, in `dtype` (default: the source's).

        Memory: the tensor, and at most its largest part once more.
        """
        fused = torch.empty(entry.megatron_shape, dtype=dtype or self.dtype)
        for suffix, view in zip(entry.hf, split_views(fused, entry, self.config.model), strict=True):
            name = self._stored_name(suffix)
            if name in self._scales:
                dequantize_into(self._reader, name, self._scales[name], self.config.fp8_block, view)
            else:
                self._reader.read_into(name, view)
        return fused

    def _stored_name(self, suffix: str) -> str:
        return self.spelling.name(EMBEDDING if suffix == HEAD and self.head_is_copied else suffix)

    def _used_names(self) -> list[str]:
        return [self._stored_name(suffix) for entry in self.table for suffix in entry.hf]

    def _check_names(self, found: set[str]) -> None:
        expected = set(self._used_names())
        missing, extra = sorted(expected - found), sorted(found - expected)
        if self.spelling.head in missing:
            raise UserError(
                f"{self.directory} has no head ({self.spelling.head}) although tie_word_embeddings is not set in its "
                "text config: set it if the head is the embedding, else download the checkpoint again"
            )
        if missing:
            raise UserError(
                f"{self.directory} lacks tensors of the model in its config.json: {some(missing)}; download it again"
            )
        if extra:
            raise UserError(
                f"{self.directory} has tensors that the model in its config.json does not have: {some(extra)}; "
                "is it another architecture, or num_hidden_layers too small?"
            )

    def _check_shapes(self) -> None:
        for entry in self.table:
            for suffix, shape in entry.hf.items():
                record = self._reader.records[self._stored_name(suffix)]
                if record.dtype not in DTYPES and record.name not in self._scales:
                    raise UserError(
                        f"{self.directory}: tensor {record.name} has format {record.dtype} without a description of it "
                        "in config.json: use the checkpoint's bf16 variant"
                    )
                if record.shape != shape:
                    raise UserError(
                        f"{self.directory}: tensor {record.name} has shape {list(record.shape)}, but config.json "
                        f"makes it {list(shape)}: one of the two files belongs to another model"
                    )


def _find_spelling(reader: SafetensorsReader, config: HfConfig, directory: Path) -> Spelling:
    """Return the spelling whose embedding is there, among those of the config's model type."""
    candidates = (NLD,) if config.is_nld else MINISTRAL_SPELLINGS
    found = [spelling for spelling in candidates if spelling.name(EMBEDDING) in reader.records]
    if len(found) != 1:
        expected = " or ".join(spelling.name(EMBEDDING) for spelling in candidates)
        raise UserError(
            f"{directory} should hold one tensor {expected}, but has {len(found)} of them (first names: "
            f"{some(reader.records, 3)})"
        )
    return found[0]
