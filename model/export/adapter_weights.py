"""The weights file of a draft adapter: PEFT's names for its tensors, whoever wrote them, and whether they do anything.

PEFT names a tensor `base_model.model.encoder.layers.0.self_attn.o_proj.lora_A.weight`. Trainers that save a state dict
leave parts of the prefix out, add those of their wrappers, or the adapter's name. PEFT would load none of these, and
say so in a warning at most.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from conf.system.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "adapter_model.safetensors"
OTHER_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")  # pickles, which may run code
TARGET = "o_proj"
KEY_PREFIX = "base_model.model."
# What may stand before a layer: PEFT's prefix, the decoder's names in this and in other definitions of the model, and
# wrappers of DeepSpeed, DDP, FSDP and torch.compile.
_WRAPPERS = "module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model|model|encoder"
_KEY = re.compile(rf"(?:(?:{_WRAPPERS})\.)*layers\.(\d+)\.self_attn\.{TARGET}\.lora_([AB])\.(?:(\w+)\.)?weight")


def name_tensor(layer: int, side: str) -> str:
    """Return PEFT's name for a tensor of a draft adapter. side: A or B."""
    return f"{KEY_PREFIX}encoder.layers.{layer}.self_attn.{TARGET}.lora_{side}.weight"


def find_stored_names(folder: Path) -> dict[str, str]:
    """Return the names in the weights file by PEFT's; one that means no tensor of a draft adapter stays as it is.

    Raises: UserError if the file is missing or damaged, or if two of its tensors are the same one.
    """
    names: dict[str, str] = {}
    for stored in _read_names(folder):
        match = _KEY.fullmatch(stored)
        name = name_tensor(int(match[1]), match[2]) if match else stored
        if name in names:
            raise UserError(
                f"the draft adapter in {folder} has {names[name]} and {stored}, which are the same tensor of two "
                "adapters: save one of them by itself"
            )
        names[name] = stored
    return names


def _read_names(folder: Path) -> list[str]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        found = next((name for name in OTHER_FILES if (folder / name).is_file()), None)
        remedy = f"save {found} as safetensors" if found else "copy or train the adapter again"
        raise UserError(f"{folder} has no {WEIGHTS_FILE}: {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def read_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor under PEFT's name. Raises: UserError as find_stored_names does."""
    names = find_stored_names(folder)
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        return {name: list(file.get_slice(stored).get_shape()) for name, stored in names.items()}


def read_tensors(folder: Path) -> Iterator[tuple[str, "Tensor"]]:
    """Yield every tensor with PEFT's name. Raises: UserError as find_stored_names does."""
    names = find_stored_names(folder)
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        for name, stored in names.items():
            yield name, file.get_tensor(stored)


def refuse_without_effect(folder: Path) -> None:
    """Refuse weights that change nothing or no number can be made of: layer by layer B A is zero, or not finite.

    Raises: UserError.
    """
    nonzero: set[str] = set()
    for name, tensor in read_tensors(folder):
        if not bool(tensor.isfinite().all()):
            raise UserError(f"the draft adapter in {folder} is damaged: {name} is not finite; train or copy it again")
        if bool(tensor.any()):
            nonzero.add(name)
    if not any(name.replace(".lora_A.", ".lora_B.") in nonzero for name in nonzero if ".lora_A." in name):
        raise UserError(
            f"the draft adapter in {folder} changes nothing: in every layer lora_A or lora_B is zero, as before "
            "training; train it, or copy the trained one"
        )
