"""A draft adapter inside an export."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from model.convert.safetensors_reader import read_header
from model.export.draft_adapter import ADAPTER_FOLDER, CONFIG_FILE, WEIGHTS_FILE, check_adapter
from model.verify_export.check import Check, failed, passed, warned

RELEASED_FORMAT = "F32"


def check_draft_adapter(directory: Path, folder: str, config: dict[str, Any]) -> Check:
    """Whether the adapter in `folder` fits the checkpoint: a LoRA on every o_proj, names, shapes and rank."""
    name = f"adapter {folder}"
    try:
        check_adapter(directory / folder, SimpleNamespace(**config))
        records = read_header(directory / folder / WEIGHTS_FILE)
        values = read_json_object(directory / folder / CONFIG_FILE, "")
    except UserError as error:
        return failed(name, str(error))
    if folder != ADAPTER_FOLDER:
        return warned(name, f"it fits, but decoding looks in {ADAPTER_FOLDER}/", f"rename it to {ADAPTER_FOLDER}")
    if other := sorted({record.dtype for record in records} - {RELEASED_FORMAT}):
        return warned(name, f"its weights are {', '.join(other)}", "the format has fp32: train or save it again")
    scale = f"rank {values['r']}, alpha {values.get('lora_alpha')}"
    return passed(name, f"{len(records)} tensors = 2 x {config['num_hidden_layers']}, {scale}")
