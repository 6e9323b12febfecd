"""Reads weights that are stored as 8-bit floats, as those of every Ministral 3 instruct checkpoint.

A weight is its stored numbers times a scale that stands beside it: one for the tensor, or one for each block of it. The
factors of activations beside them belong to 8-bit arithmetic, not to the weights. Computed as transformers dequantises:
in fp32, rounded once to the format asked for (transformers/integrations/finegrained_fp8.py, Fp8Dequantize).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.system.errors import UserError
from model.convert.safetensors_reader import DTYPES, FP8, SafetensorsReader, TensorRecord, some

METHOD = "fp8"  # quant_method of config.json
SCALE, ACTIVATION_SCALE = "_scale_inv", "activation_scale"  # weight -> weight_scale_inv, and its neighbour
CHUNK_ELEMENTS = 1 << 22  # of a weight that are fp32 at a time: 16 MiB


def read_block_shape(quantization: Any, path: Path) -> tuple[int, int] | None:
    """Read the block of a scale [rows, columns] from quantization_config of config.json; None: scales of whole tensors.

    Raises:
        UserError: another way of quantising than fp8, or a block that is none.
    """
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != METHOD:
        raise UserError(
            f"{path} describes quantised weights ({method or 'quantization_config'}): only {METHOD} is read; use the "
            "checkpoint's bf16 variant"
        )
    block = quantization.get("weight_block_size")
    if block is None:
        return None
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise UserError(f"{path} has weight_block_size {block!r}: it must be two whole numbers, or null")
    return block[0], block[1]


def find_scales(
    records: Mapping[str, TensorRecord], block: tuple[int, int] | None, directory: Path
) -> dict[str, TensorRecord]:
    """Find the scale of every 8-bit weight, by the weight's name.

    Raises:
        UserError: a weight has no scale or one of another shape, or a scale has no weight.
    """
    weights = [record for record in records.values() if record.dtype in FP8]
    scales = {record.name: records.get(record.name + SCALE) for record in weights}
    if missing := [name for name, scale in scales.items() if scale is None or scale.dtype not in DTYPES]:
        raise UserError(f"{directory} holds 8-bit weights without {SCALE} beside them: {some(missing)}")
    alone = [name for name in records if name.endswith(SCALE) and name.removesuffix(SCALE) not in scales]
    if alone:
        raise UserError(f"{directory} has scales whose weights are not 8-bit or missing: {some(alone)}")
    for weight in weights:
        _check_scale_shape(weight, records[weight.name + SCALE], block, directory)
    return {weight.name: records[weight.name + SCALE] for weight in weights}


def is_activation_scale(name: str) -> bool:
    """Return whether a tensor is a factor of activations, which no weight depends on."""
    return name.endswith("." + ACTIVATION_SCALE)


def _check_scale_shape(
    weight: TensorRecord, scale: TensorRecord, block: tuple[int, int] | None, directory: Path
) -> None:
    if block is None:
        fits, expected = scale.shape in ((), (1,), (1, 1)), "one number"
    else:
        grid = tuple(-(-size // side) for size, side in zip(weight.shape, block, strict=False))
        fits, expected = len(weight.shape) == 2 and scale.shape == grid, f"{list(grid)}"
    if not fits:
        raise UserError(
            f"{directory}: scale {scale.name} has shape {list(scale.shape)}, but quantization_config in config.json "
            f"makes it {expected}: one of the two files belongs to another model"
        )


def dequantize_into(
    reader: SafetensorsReader, name: str, scale: TensorRecord, block: tuple[int, int] | None, out: Tensor
) -> None:
    """Write weight `name` times its scale into `out`, of as many elements but any dtype, shape or strides.

    Memory: the stored weight, its values in the dtype of `out` unless `out` is contiguous, and CHUNK_ELEMENTS in fp32.
    """
    stored, factors = reader.read(name), reader.read(scale.name).float()
    values = out.view(stored.shape) if out.is_contiguous() else torch.empty(stored.shape, dtype=out.dtype)
    step = max(1, CHUNK_ELEMENTS // max(1, stored[0].numel()))
    if block is not None:
        step = -(-step // block[0]) * block[0]  # chunks of whole blocks
    for first in range(0, len(stored), step):
        part = stored[first : first + step].float()
        values[first : first + step] = part * _expand(factors, block, first, part)
    if values.data_ptr() != out.data_ptr():
        out.copy_(values.view(out.shape))


def _expand(factors: Tensor, block: tuple[int, int] | None, first: int, part: Tensor) -> Tensor:
    """Return the factor of each element of `part`, which begins in row `first` of the weight; it broadcasts."""
    if block is None:
        return factors.view(())
    grid = factors[first // block[0] :]
    by_row = grid.repeat_interleave(block[0], dim=0)[: part.shape[0]]
    return by_row.repeat_interleave(block[1], dim=1)[:, : part.shape[1]]
