"""Writes a tri-mode (NLD) directory: weights tensor by tensor, config.json, tokenizer and the model's own code.

Serving software silently skips names it does not know, so conversion.verify_written_export() reads the directory back
before it gets its final name.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.schema import ModelConfig
from conf.system.atomic import atomic_write_text
from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from conf.tokenizer_info import token_text
from model.checkpoint.layout import CheckpointManifest
from model.convert.mapping import NLD, TensorEntry, split_views
from model.convert.nld_config import build_nld_config
from model.convert.safetensors_writer import SafetensorsWriter, TensorSpec
from model.export.shipped_code import list_code_files

DTYPE_WORDS = {torch.bfloat16: "bfloat16", torch.float32: "float32"}

CHAT_TEMPLATE_NAME = "chat_template.jinja"
# The files of a tokenizer; nothing else is copied.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    CHAT_TEMPLATE_NAME,
    "chat_template.json",
)


def build_specs(table: list[TensorEntry], dtype: torch.dtype) -> list[TensorSpec]:
    """List the export's tensors in file order: 9 per layer and 3 more."""
    return [TensorSpec(NLD.name(suffix), shape, dtype) for entry in table for suffix, shape in entry.hf.items()]


def add_entry(
    writer: SafetensorsWriter, entry: TensorEntry, fused: Tensor, model: ModelConfig, dtype: torch.dtype
) -> None:
    """Write the Hugging Face tensors of one Megatron tensor, rounded to nearest (ties to even) if `dtype` is narrower.

    Memory: `fused`, and its largest part in `dtype`.
    """
    for (suffix, shape), view in zip(entry.hf.items(), split_views(fused, entry, model), strict=True):
        writer.add(NLD.name(suffix), view.to(dtype).reshape(shape))


def write_config_files(directory: Path, manifest: CheckpointManifest, model: ModelConfig, dtype: torch.dtype) -> None:
    """Write config.json and generation_config.json."""
    config = build_nld_config(manifest, model, DTYPE_WORDS[dtype])
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", generation)


def copy_tokenizer_files(source: Path, directory: Path) -> None:
    """Copy the tokenizer's files. Raises: UserError if there is no tokenizer.json."""
    if not (source / "tokenizer.json").is_file():
        raise UserError(f"{source} has no tokenizer.json: put the tokenizer's files there")
    directory.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def write_chat_format(directory: Path, template: str, end_of_turn_id: int) -> None:
    """Give the tokenizer in `directory` a chat template, and the end of a turn as its end of sequence.

    Raises:
        UserError: the tokenizer has no such token.
    """
    path = directory / "tokenizer_config.json"
    config = read_json_object(path, f"{path} is missing") if path.is_file() else {}
    config.pop("chat_template", None)  # the file written below is the only definition
    config["eos_token"] = token_text(directory, end_of_turn_id)
    _write_json(path, config)
    atomic_write_text(directory / CHAT_TEMPLATE_NAME, template)


def copy_code(directory: Path) -> None:
    """Copy the files that auto_map in config.json names and every sibling they import."""
    for path in list_code_files():
        shutil.copyfile(path, directory / path.name)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    atomic_write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")
