"""Whether a folder holds a draft adapter of a checkpoint, read from its configuration and the header of its weights.

Checked before PEFT is asked, whose errors about a wrong adapter are tracebacks or, for missing layers, silence.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from conf.system.errors import UserError
from conf.system.json_file import read_json_object

ADAPTER_FOLDER = "linear_spec_lora"  # of the released checkpoints, inside them
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
RECORD_FILE = "drafter.json"  # beside PEFT's two files: what an adapter of ours was trained with
TARGET = "o_proj"
KEY_PREFIX = "base_model.model."

Shapes = dict[str, list[int]]


def check_adapter(folder: Path, config: Any) -> None:
    """config: of the checkpoint.

    Raises: UserError unless `folder` holds a LoRA on all of its o_proj and nothing else.
    """
    if not folder.is_dir():
        raise UserError(f"there is no draft adapter in {folder}: give the folder that holds {CONFIG_FILE}")
    values = read_json_object(folder / CONFIG_FILE, f"{folder} is no adapter of PEFT: it has no {CONFIG_FILE}")
    _check_kind(folder, values)
    _check_weights(folder, values, _read_shapes(folder / WEIGHTS_FILE), config)


def _check_kind(folder: Path, values: dict[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise UserError(f"the adapter in {folder} is no LoRA: {CONFIG_FILE} has peft_type {values.get('peft_type')!r}")
    targets = values.get("target_modules")
    names = [str(name) for name in targets] if isinstance(targets, list) else [str(targets or "")]
    if {name.rpartition(".")[2] for name in names} != {TARGET}:
        changed = ", ".join(sorted(names)) or "nothing"
        raise UserError(f"the adapter in {folder} is no drafter ({TARGET} alone): it changes {changed}")


def _read_shapes(path: Path) -> Shapes:
    if not path.is_file():
        raise UserError(f"{path.parent} has no {WEIGHTS_FILE}: copy or train the adapter again")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _check_weights(folder: Path, values: dict[str, Any], found: Shapes, config: Any) -> None:
    """Raises: UserError naming the number of layers, the width or the rank that differs."""
    layers = {name.partition(".layers.")[2].partition(".")[0] for name in found} - {""}
    if not layers:
        raise UserError(f"the draft adapter in {folder} has no tensor of any layer: it is not plain LoRA on {TARGET}")
    if len(layers) != config.num_hidden_layers:
        raise UserError(
            f"the draft adapter in {folder} has {len(layers)} layers, the checkpoint {config.num_hidden_layers}: "
            "it was made for another one"
        )
    expected = dict(_expected_shapes(values.get("r"), config))
    if other := sorted(expected.keys() ^ found.keys()):
        problem = "has no" if other[0] in expected else "has an unknown"
        raise UserError(f"the draft adapter in {folder} {problem} tensor {other[0]}: it is not plain LoRA on {TARGET}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(_describe_difference(folder, name, found[name], shape))


def _expected_shapes(rank: Any, config: Any) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of the released adapters' tensors. rank: as the adapter's configuration has it."""
    q_width = config.num_attention_heads * config.head_dim
    for layer in range(config.num_hidden_layers):
        prefix = f"{KEY_PREFIX}encoder.layers.{layer}.self_attn.{TARGET}.lora_"
        yield f"{prefix}A.weight", [rank, q_width]
        yield f"{prefix}B.weight", [config.hidden_size, rank]


def _describe_difference(folder: Path, name: str, found: list[int], expected: list[int]) -> str:
    width, rank = (1, 0) if name.endswith("lora_A.weight") else (0, 1)
    if len(found) == 2 and found[width] == expected[width]:
        return (
            f"the draft adapter in {folder} does not fit its own configuration: {CONFIG_FILE} says rank "
            f"{expected[rank]}, but {name} has rank {found[rank]}"
        )
    return (
        f"the draft adapter in {folder} was made for another checkpoint: {name} is {found}, this one needs {expected}"
    )
