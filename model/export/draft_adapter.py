"""Checks that a draft adapter belongs to a checkpoint: its kind, names, shapes, and the weights it was trained for.

Its files are read before PEFT loads anything: PEFT reports a wrong adapter with a traceback or, if layers are missing
or it changes nothing, not at all.
"""

import hashlib
from collections.abc import Iterator, Sequence
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from model.export.adapter_weights import TARGET, name_tensor, read_shapes, refuse_without_effect
from model.export.shipped_code import CONFIG_NAME, VERSION_KEY

ADAPTER_FOLDER = "linear_spec_lora"  # where released checkpoints hold theirs
CONFIG_FILE = "adapter_config.json"
RECORD_FILE = "drafter.json"  # next to PEFT's two files: how an adapter of ours was trained
# Beginnings that are taken from the model's own weights, which PEFT changes when it loads such an adapter.
CHANGING_BEGINNINGS = ("pissa", "olora", "corda", "loftq")
# Beginnings of lines of config.json that came later than the first exports.
LATER_LINES = (f'"{VERSION_KEY}"', '"sliding_window": null', '"pad_token_id": null')
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096  # per weight file, of identify_checkpoint

Shapes = dict[str, list[int]]


def check_adapter(folder: Path, config: Any) -> None:
    """Refuse a folder unless it holds a LoRA on every o_proj of the checkpoint and on nothing else.

    It must change something. Its tensors need not have PEFT's names: see adapter_weights.py.

    Args:
        folder: the adapter's.
        config: the checkpoint's.

    Raises:
        UserError: the adapter is missing, damaged, of another kind or of another checkpoint, or changes nothing.
    """
    if not folder.is_dir():
        raise UserError(f"there is no draft adapter in {folder}: give the folder that holds {CONFIG_FILE}")
    values = read_json_object(folder / CONFIG_FILE, f"{folder} is not a PEFT adapter: it has no {CONFIG_FILE}")
    _check_kind(folder, values)
    _check_scale(folder, values)
    _check_weights(folder, values, read_shapes(folder), config)
    refuse_without_effect(folder)


def _check_kind(folder: Path, values: dict[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise UserError(
            f"the adapter in {folder} is not a LoRA: {CONFIG_FILE} has peft_type {values.get('peft_type')!r}"
        )
    targets = values.get("target_modules")
    names = [str(name) for name in targets] if isinstance(targets, list) else [str(targets or "")]
    if {name.rpartition(".")[2] for name in names} != {TARGET}:
        changed = ", ".join(sorted(names)) or "nothing"
        raise UserError(f"the adapter in {folder} is not a drafter: it changes {changed} instead of {TARGET} alone")
    beginning = str(values.get("init_lora_weights")).lower()
    if beginning.startswith(CHANGING_BEGINNINGS):
        raise UserError(
            f"the adapter in {folder} begins with a part of the model's own weights (init_lora_weights={beginning!r}), "
            "which loading takes out of them, and the verifier would not be the checkpoint: convert it to a plain LoRA "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )


def compute_scale(values: dict[str, Any]) -> float:
    """Return what PEFT multiplies B A by: alpha / r, or alpha / sqrt(r) with use_rslora.

    values: of adapter_config.json, without patterns. Raises: ValueError, TypeError if these are no such numbers.
    """
    rank, alpha = float(values["r"]), float(values["lora_alpha"])
    if not rank > 0:
        raise ValueError(f"rank {rank:g}")
    return alpha / sqrt(rank) if values.get("use_rslora") else alpha / rank


def _check_scale(folder: Path, values: dict[str, Any]) -> None:
    """Refuse a scale of zero, one that is no number, and one that training did not have."""
    try:
        scale = compute_scale(values)
    except (KeyError, TypeError, ValueError):
        scale = float("nan")
    stated = f"{CONFIG_FILE} has r {values.get('r')} and lora_alpha {values.get('lora_alpha')}"
    if not isfinite(scale):
        raise UserError(f"the draft adapter in {folder} has no scale: {stated}; give the numbers it was trained with")
    alphas = [scale, *(values.get("alpha_pattern") or {}).values()]
    if not any(alphas):
        raise UserError(f"the draft adapter in {folder} changes nothing: {stated}, so that its update is scaled by 0")
    record = folder / RECORD_FILE
    if not record.is_file():
        return
    trained = read_json_object(record, f"{record} has disappeared")
    if {"rank", "alpha"} <= trained.keys() and scale != trained["alpha"] / trained["rank"]:
        raise UserError(
            f"the draft adapter in {folder} was trained with rank {trained['rank']} and alpha {trained['alpha']:g}, "
            f"but {stated}{' and use_rslora' if values.get('use_rslora') else ''}: copy or train the adapter again"
        )


def _check_weights(folder: Path, values: dict[str, Any], found: Shapes, config: Any) -> None:
    """Compare tensor names and shapes. Raises: UserError naming the number of layers, width or rank that differs."""
    layers = {name.partition(".layers.")[2].partition(".")[0] for name in found} - {""}
    if not layers:
        raise UserError(f"the draft adapter in {folder} has no tensor of any layer: it is not plain LoRA on {TARGET}")
    if len(layers) != config.num_hidden_layers:
        raise UserError(
            f"the draft adapter in {folder} has {len(layers)} layers, the checkpoint {config.num_hidden_layers}: "
            "it was made for another checkpoint"
        )
    expected = dict(_expected_shapes(values, found, config))
    if other := sorted(expected.keys() ^ found.keys()):
        problem = "has no" if other[0] in expected else "has an unknown"
        raise UserError(f"the draft adapter in {folder} {problem} tensor {other[0]}: it is not plain LoRA on {TARGET}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(_describe_difference(folder, name, found[name], shape))


def _expected_shapes(values: dict[str, Any], found: Shapes, config: Any) -> Iterator[tuple[str, list[int]]]:
    """Yield the names and shapes of a drafter's tensors, of the rank that the adapter's configuration states.

    Where a pattern gives layers their own rank, PEFT compares it when it loads; here both sides must have the same.
    """
    q_width = config.num_attention_heads * config.head_dim
    for layer in range(config.num_hidden_layers):
        down, up = name_tensor(layer, "A"), name_tensor(layer, "B")
        rank: Any = found[down][0] if values.get("rank_pattern") and down in found else values.get("r")
        yield down, [rank, q_width]
        yield up, [config.hidden_size, rank]


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


def check_trained_for(adapter: Path, export: Path) -> None:
    """Refuse an adapter whose record says that it was trained for other weights; not every adapter has a record.

    Raises:
        UserError: the recorded checkpoint is not `export`.
    """
    path = adapter / RECORD_FILE
    if not path.is_file():
        return
    trained_for = read_json_object(path, f"{path} has disappeared").get("checkpoint")
    if trained_for is not None and not is_checkpoint(export, trained_for):
        raise UserError(
            f"the draft adapter in {adapter} was trained for another checkpoint than {export}: train one for this "
            f"checkpoint (python -m lora.train). If only the files differ but the weights are the same, remove {path}"
        )


def is_checkpoint(directory: Path, identity: str) -> bool:
    """Return whether `identity` is that of an export, as this version or an earlier one of the project computes it."""
    config = (directory / CONFIG_NAME).read_bytes()
    dropped = (LATER_LINES, LATER_LINES[:1], LATER_LINES[1:], ())  # today's, and what earlier versions left out
    return identity in (_identify(directory, _drop_lines(config, lines)) for lines in dropped)


def identify_checkpoint(directory: Path) -> str:
    """Hash an export's configuration, the names and sizes of its weight files, and samples of their bytes.

    Training changes nearly every weight, so samples suffice to distinguish checkpoints; the first sample of each file
    is its header. What a refresh adds to the configuration makes no difference.
    """
    return _identify(directory, _drop_lines((directory / CONFIG_NAME).read_bytes(), LATER_LINES))


def _drop_lines(config: bytes, dropped: Sequence[str]) -> bytes:
    lines = config.splitlines(keepends=True)
    return b"".join(line for line in lines if not line.strip().startswith(tuple(text.encode() for text in dropped)))


def _identify(directory: Path, config: bytes) -> str:
    digest = hashlib.sha256(config)
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for index in range(NUM_SAMPLES):
                file.seek(size * index // NUM_SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
