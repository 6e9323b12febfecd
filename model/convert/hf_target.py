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
from conf.system.json_file import read_optional_json
from conf.tokenizer_info import token_text
from model.checkpoint.layout import CheckpointManifest
from model.convert.mapping import NLD, TensorEntry, split_views
from model.convert.nld_config import DECODING_DEFAULTS, build_generation_config, build_nld_config
from model.convert.processor_config import IMAGE_SETTINGS, build_processor_config
from model.convert.safetensors_writer import SafetensorsWriter, TensorSpec
from model.export.shipped_code import CONFIG_NAME, GENERATION_CONFIG_NAME, PROCESSOR_CONFIG_NAME, list_code_files

DTYPE_WORDS = {torch.bfloat16: "bfloat16", torch.float32: "float32"}

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
SPECIAL_TOKENS_NAME = "special_tokens_map.json"
# The files of a tokenizer; nothing else is copied.
TOKENIZER_FILES = (
    TOKENIZER_NAME,
    TOKENIZER_CONFIG_NAME,
    SPECIAL_TOKENS_NAME,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    CHAT_TEMPLATE_NAME,
    "chat_template.json",
)


def build_specs(table: list[TensorEntry], dtype: torch.dtype) -> list[TensorSpec]:
    """List the export's tensors in file order: 9 per layer and 3 more, then those of tower and projector."""
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
    """Write config.json, generation_config.json and, of a model that reads images, processor_config.json."""
    config = build_nld_config(manifest, model, DTYPE_WORDS[dtype])
    _write_json(directory / CONFIG_NAME, config)
    generation = build_generation_config(config, manifest.export.get(DECODING_DEFAULTS, {}))
    _write_json(directory / GENERATION_CONFIG_NAME, generation)
    if model.vision is not None:
        processor = build_processor_config(model.vision, manifest.export.get(IMAGE_SETTINGS, {}))
        _write_json(directory / PROCESSOR_CONFIG_NAME, processor)


def copy_tokenizer_files(source: Path, directory: Path) -> None:
    """Copy the tokenizer's files. Raises: UserError if there is no tokenizer.json."""
    if not (source / TOKENIZER_NAME).is_file():
        raise UserError(f"{source} has no {TOKENIZER_NAME}: put the tokenizer's files there")
    directory.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def build_portable_tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json in the words that transformers 4.57 and 5 share; nothing else changes.

    The class is one that takes tokenizer.json as it is, which is how this project reads it: the classes of some
    families build another pre-tokenizer, and TokenizersBackend exists in version 5 alone. Version 5 also calls the
    special tokens without a name extra_special_tokens, where 4.57 expects names.
    """
    portable = config | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(portable.get("extra_special_tokens"), list):
        tokens = [*(portable.get("additional_special_tokens") or []), *portable.pop("extra_special_tokens")]
        portable["additional_special_tokens"] = list(dict.fromkeys(tokens))
    return portable


def write_portable_tokenizer_config(directory: Path) -> None:
    """Rewrite tokenizer_config.json in `directory` for every supported transformers. Raises: UserError if damaged."""
    config = read_tokenizer_config(directory)
    if (portable := build_portable_tokenizer_config(config)) != config:
        _write_json(directory / TOKENIZER_CONFIG_NAME, portable)


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """Read tokenizer_config.json; empty if there is none. Raises: UserError if it is damaged."""
    return read_optional_json(directory / TOKENIZER_CONFIG_NAME)


def write_chat_format(directory: Path, template: str, end_of_turn_id: int) -> None:
    """Give the tokenizer in `directory` a chat template, and the end of a turn as its end of sequence.

    Raises:
        UserError: the tokenizer has no such token.
    """
    eos_token = token_text(directory, end_of_turn_id)
    config = read_tokenizer_config(directory)
    config.pop("chat_template", None)  # the file written below is the only definition
    _write_json(directory / TOKENIZER_CONFIG_NAME, config | {"eos_token": eos_token})
    named = directory / SPECIAL_TOKENS_NAME
    if named.is_file():  # transformers goes by it where it is there
        _write_json(named, read_optional_json(named) | {"eos_token": eos_token})
    atomic_write_text(directory / CHAT_TEMPLATE_NAME, template)


def copy_code(directory: Path, model_type: str) -> None:
    """Copy the files that auto_map in an export's files names and every sibling they import."""
    for path in list_code_files(model_type):
        shutil.copyfile(path, directory / path.name)


def format_json(values: dict[str, Any]) -> str:
    """Return a configuration file's text."""
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _write_json(path: Path, values: dict[str, Any]) -> None:
    atomic_write_text(path, format_json(values))
