"""Reads config.json of a Hugging Face checkpoint into ModelConfig.

Accepted: the vision-language wrapper of Ministral 3 (`mistral3`, decoder in text_config), its text model
(`ministral3`) and the tri-mode exports, of text (`nemotron_labs_diffusion`) or with images (`..._vlm`). Read without
transformers; a test compares every spelling of the rotary parameters with what transformers makes of it.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import ModelConfig, RopeConfig
from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from model.convert.fp8 import read_block_shape
from model.convert.vision_config import read_vision_config
from model.export.shipped_code import CONFIG_NAME, NLD_TYPE, VLM_TYPE
from model.hf.rope import compute_attention_factor

_VISION_TYPE, _TEXT_TYPE = "mistral3", "ministral3"

# Hugging Face name -> field of ModelConfig; every one must be there: a default would be another model.
_DIMENSIONS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
}
_OPTIONAL = {
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "init_std",
}
# Settings that would make another architecture: key -> the values that leave them unused.
_MUST_BE = {
    "hidden_act": (None, "silu"),
    "sliding_window": (None,),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
}
_ROPE_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "llama_4_scaling_beta",
    "attention_factor",
    "partial_rotary_factor",
}
_ROPE_WORDS = {"rope_type", "type", "truncate"}  # the others are numbers
_BESIDE_ROPE = ("rope_theta", "original_max_position_embeddings")  # some files have them outside of the parameters
_TRANSFORMERS_THETA = 10_000.0  # transformers' base if the rotary parameters name none


@dataclass(frozen=True)
class HfConfig:
    """The content of config.json.

    Attributes:
        model: dimensions of the text decoder; of an export with images also of its tower. Ministral 3's is left out.
        is_nld: whether this is a tri-mode export, with or without images, and not Ministral 3.
        tied: whether the head is the embedding.
        bos_token_id: the first, if there are several.
        eos_token_id: as the file has it: a number, a list or None (generation.py says which count).
        values: the decoder's part of the file, unchanged (text_config of the wrapper).
        is_fp8: whether weights are stored as 8-bit floats with scales.
        fp8_block: rows and columns that share a scale; None: whole tensors do.
    """

    model: ModelConfig
    is_nld: bool
    tied: bool
    bos_token_id: int | None
    eos_token_id: Any
    values: dict[str, Any]
    is_fp8: bool = False
    fp8_block: tuple[int, int] | None = None


def read_hf_config(directory: Path | str) -> HfConfig:
    """Read config.json of a checkpoint directory.

    Raises:
        UserError: the file is missing, damaged, of another model type, quantised in another way than fp8 (an export: at
            all), or describes a decoder that this project does not compute (the message names the key).
    """
    path = Path(directory) / CONFIG_NAME
    top = _load(path)
    kind = top.get("model_type")
    quantization = _find_quantization(top)
    is_nld = kind in (NLD_TYPE, VLM_TYPE)
    if quantization and is_nld:
        raise UserError(f"{path} describes quantised weights: exports are read in bf16 or fp32")
    values = _text_config(top, path) if kind == _VISION_TYPE else top
    if kind not in (_VISION_TYPE, _TEXT_TYPE) and not is_nld:
        raise UserError(
            f"{path} has model_type {kind!r}: only {_VISION_TYPE} or {_TEXT_TYPE} (Ministral 3) and {NLD_TYPE} or "
            f"{VLM_TYPE} (its tri-mode exports) can be converted"
        )
    model = _model_config(values, path)
    if kind == VLM_TYPE:
        model.vision = read_vision_config(top, path)
    return HfConfig(
        model=model,
        is_nld=is_nld,
        tied=bool(values.get("tie_word_embeddings", False)),
        bos_token_id=_first_id(values.get("bos_token_id", top.get("bos_token_id"))),
        eos_token_id=values.get("eos_token_id", top.get("eos_token_id")),
        values=values,
        is_fp8=bool(quantization),
        fp8_block=read_block_shape(quantization, path) if quantization else None,
    )


def _find_quantization(values: dict[str, Any]) -> Any:
    """Return quantization_config of a config, or of its text_config; None if neither has one."""
    nested = values.get("text_config")
    inside = nested.get("quantization_config") if isinstance(nested, dict) else None
    return values.get("quantization_config") or inside


def _load(path: Path) -> dict[str, Any]:
    return read_json_object(path, f"{path.parent} is not a Hugging Face checkpoint: it has no {CONFIG_NAME}")


def _text_config(top: dict[str, Any], path: Path) -> dict[str, Any]:
    values = top.get("text_config")
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != _TEXT_TYPE:
        raise UserError(f"{path} has text_config.model_type {kind!r}: only {_TEXT_TYPE} (Ministral 3) can be converted")
    return values  # type: ignore[return-value]


def _model_config(values: dict[str, Any], path: Path) -> ModelConfig:
    missing = [key for key in _DIMENSIONS if not isinstance(values.get(key), int)]
    if missing:
        raise UserError(f"{path} does not give {', '.join(missing)} as whole numbers: complete it from the release")
    for key, accepted in _MUST_BE.items():
        if values.get(key) not in accepted:
            raise UserError(f"{path} has {key}={values[key]!r}: this project computes {key}={accepted[-1]!r} only")
    fields = {ours: values[theirs] for theirs, ours in _DIMENSIONS.items()}
    fields |= {ours: values[theirs] for theirs, ours in _OPTIONAL.items() if values.get(theirs) is not None}
    _refuse_non_numbers({key: values.get(key) for key in (*_OPTIONAL, *_BESIDE_ROPE)}, path)
    model = ModelConfig(**fields, name=path.parent.resolve().name)
    model.rope = _rope_config(values, model.max_position_embeddings, path)
    return model


def _rope_config(values: dict[str, Any], max_positions: int, path: Path) -> RopeConfig:
    """Build RopeConfig from `rope_parameters`, or from `rope_scaling` and `rope_theta` of older files."""
    rope = values.get("rope_scaling") or values.get("rope_parameters")
    if rope is None:
        return RopeConfig()  # transformers' Ministral 3 defaults; a test compares them
    _check_rope(rope, path)
    original = _original_max_positions(values, rope, max_positions, path)
    factor = rope["factor"] if rope["factor"] is not None else max_positions / original
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if not (mscale and mscale_all_dim):
        mscale, mscale_all_dim = 1.0, 0.0  # transformers ignores one without the other: 0.1 * ln(factor) + 1
    config = RopeConfig(
        theta=float(rope.get("rope_theta", values.get("rope_theta", _TRANSFORMERS_THETA))),
        factor=float(factor),
        original_max_position_embeddings=int(original),
        beta_fast=float(rope.get("beta_fast") or RopeConfig.beta_fast),
        beta_slow=float(rope.get("beta_slow") or RopeConfig.beta_slow),
        mscale=float(mscale),
        mscale_all_dim=float(mscale_all_dim),
        truncate=bool(rope.get("truncate", True)),
        llama_4_scaling_beta=float(rope["llama_4_scaling_beta"]),
    )
    _check_attention_factor(rope.get("attention_factor"), config, path)
    return config


def _check_rope(rope: Any, path: Path) -> None:
    if not isinstance(rope, dict):
        raise UserError(f"{path} has rope_parameters that are not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "yarn":
        raise UserError(f"{path} has rope_type {kind!r}: this project computes yarn only")
    unknown = sorted(rope.keys() - _ROPE_KEYS)
    if unknown:
        raise UserError(f"{path} has rotary parameters this project does not know: {', '.join(unknown)}")
    missing = [key for key in ("factor", "llama_4_scaling_beta") if key not in rope]
    if missing:
        raise UserError(f"{path} has rope_parameters without {', '.join(missing)}: complete it from the release")
    if empty := [key for key in ("llama_4_scaling_beta", "rope_theta") if key in rope and rope[key] is None]:
        raise UserError(
            f"{path} has rope_parameters without a value of {', '.join(empty)}: complete it from the release"
        )
    _refuse_non_numbers({key: rope.get(key) for key in sorted(_ROPE_KEYS - _ROPE_WORDS)}, path)
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(f"{path} has partial_rotary_factor {rope['partial_rotary_factor']}: only 1 is computed")


def _refuse_non_numbers(values: dict[str, Any], path: Path) -> None:
    """Refuse values that are neither numbers nor None. Raises: UserError."""
    for key, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not is_number:
            raise UserError(f"{path} has {key}={value!r}: it must be a number; copy it from the release")


def _original_max_positions(values: dict[str, Any], rope: dict[str, Any], max_positions: int, path: Path) -> int:
    """Return the context of the first training; some files state it outside of the rotary parameters."""
    key = "original_max_position_embeddings"
    inside, beside = rope.get(key), values.get(key)
    if inside is not None and beside is not None and inside != beside:
        raise UserError(f"{path} has two values of {key}, {inside} and {beside}: remove the wrong one")
    return next((value for value in (inside, beside) if value is not None), max_positions)


def _check_attention_factor(given: float | None, rope: RopeConfig, path: Path) -> None:
    """Check that an explicit attention_factor is the one implied by mscale, mscale_all_dim and factor."""
    implied = compute_attention_factor(rope.factor, mscale=rope.mscale, mscale_all_dim=rope.mscale_all_dim)
    if given is not None and not math.isclose(given, implied, rel_tol=1e-6):
        raise UserError(
            f"{path} has attention_factor {given}, but its mscale values imply {implied}: only that is computed"
        )


def _first_id(value: Any) -> int | None:
    """Return a token id; the first of a list (several ends of text)."""
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) else None
