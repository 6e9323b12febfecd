"""Damage a copy of an export in the ways that exports go wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def edit_json(path: Path, *without: str, **changes: Any) -> None:
    """Change values of a JSON object; `without`: keys that are removed."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in without}))


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite a safetensors file after `edit` has changed its tensors in place."""
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def flip_byte(path: Path, place: int) -> None:
    """Turn over the bits of one byte; a negative place counts from the end."""
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
