"""Checks config.json and generation_config.json: complete, consistent, of a model that this project computes."""

import math
import shlex
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from model.convert.hf_config import HfConfig, read_hf_config
from model.convert.nld_config import ABSENT
from model.convert.safetensors_reader import some
from model.export.shipped_code import (
    ARCHITECTURES,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    NLD_TYPE,
    OLDER_ARCHITECTURE,
    VLM_TYPE,
    find_model_type,
)
from model.hf.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig, default_rope_parameters
from model.hf.configuration_nemotron_labs_diffusion_vlm import NemotronLabsDiffusionVLMConfig
from model.verify_export.check import ExportCheck

COPY = "copy it from the release, or from an export of python -m model.convert"
# Accepted names of the attention implementation; other names refer to code in a package or on the hub.
ATTENTION_KEYS, ATTENTION_WORDS = ("attn_implementation", "_attn_implementation"), (None, "sdpa", "eager")
# Without these, another model would be computed or no code found.
REQUIRED_KEYS = (
    *("architectures", "model_type", "auto_map", "tie_word_embeddings", "vocab_size", "hidden_size"),
    *("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "max_position_embeddings", "rope_parameters", "mask_token_id", "block_size", "eos_token_id"),
)
# The same of a model that reads images.
VISION_KEYS = (
    *("vision_config", "spatial_merge_size", "projector_hidden_act", "multimodal_projector_bias"),
    "vision_feature_layer",
)
# Of generation_config.json: how servers denoise a block.
DENOISING_KEYS = ("diffusion_selection_policy", "max_denoising_steps", "diffusion_confidence_threshold")
SELECTION_POLICIES = ("confidence_threshold", "low_confidence", "leftmost")  # that servers know
# Other software reads these; nothing that this project computes depends on them, or their defaults are the format's.
EXPECTED_KEYS = (
    *("hidden_act", "attention_bias", "mlp_bias", "bos_token_id"),
    *("dlm_paradigm", "dlm_loss_weight", "ar_loss_weight", "dp_varying_mask_ratio"),
)


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json. Raises: UserError if it is missing or damaged."""
    return read_json_object(directory / CONFIG_NAME, f"{CONFIG_NAME} is missing: {COPY}")


def check_keys(config: dict[str, Any]) -> ExportCheck:
    """Check that config.json has the keys of the format; further keys are fine."""
    name = "config keys"
    is_vlm = config.get("model_type") == VLM_TYPE
    required = REQUIRED_KEYS + (VISION_KEYS if is_vlm else ())
    missing = [key for key in required if config.get(key) is None]
    rope = config.get("rope_parameters")
    missing += [f"rope_parameters.{key}" for key in default_rope_parameters() if not _has(rope, key)]
    if missing:
        return ExportCheck.failed(name, f"{CONFIG_NAME} lacks {some(missing, 20)}", COPY)
    accepted = [ARCHITECTURES[VLM_TYPE]] if is_vlm else [ARCHITECTURES[NLD_TYPE], OLDER_ARCHITECTURE]
    if config["architectures"] not in [[name] for name in accepted]:
        return ExportCheck.failed(name, f"{CONFIG_NAME} has architectures {config['architectures']}", COPY)
    expected = [key for key in EXPECTED_KEYS if config.get(key) is None]
    if not (config.get("torch_dtype") or config.get("dtype")):
        expected.append("torch_dtype")
    expected += [f"{key} (null)" for key in ABSENT if key not in config]
    if expected:
        return ExportCheck.warned(
            name, f"{CONFIG_NAME} lacks {some(expected, 20)}", "other software may want it: " + COPY
        )
    if config.get("pad_token_id") is not None:
        return ExportCheck.warned(
            name, f"pad_token_id is {config['pad_token_id']}", "this format has none: that token may be in use"
        )
    number = len(required) + len(EXPECTED_KEYS) + len(ABSENT)
    return ExportCheck.passed(name, f"all {number} there, rope_parameters complete")


def _has(rope: Any, key: str) -> bool:
    return isinstance(rope, dict) and rope.get(key) is not None


def check_model(directory: Path, config: dict[str, Any]) -> tuple[ExportCheck, HfConfig | None]:
    """Check that both readers of config.json accept it: the converter's, and the code shipped with exports."""
    found: list[HfConfig] = []

    def read() -> str:
        found.append(read_hf_config(directory))
        _refuse_attention_code(config)
        _build_shipped_config(config)
        model = found[0].model
        return (
            f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads of "
            f"{model.head_dim}, {model.num_key_value_heads} key/value, vocabulary {model.vocab_size}"
        )

    return ExportCheck.of_action("model", read), found[0] if found else None


def _refuse_attention_code(config: dict[str, Any]) -> None:
    """Refuse a config that makes loading fetch attention code, even without trust_remote_code. Raises: UserError."""
    for key in ATTENTION_KEYS:
        if config.get(key) not in ATTENTION_WORDS:
            raise UserError(f"{CONFIG_NAME} has {key} {config[key]!r}: loading may fetch that code; remove the key")


def _build_shipped_config(config: dict[str, Any]) -> None:
    """Build the shipped configuration class. Raises: UserError with the reason why AutoConfig would refuse it."""
    kind = NemotronLabsDiffusionVLMConfig if config.get("model_type") == VLM_TYPE else NemotronLabsDiffusionConfig
    try:
        kind(**{key: value for key, value in config.items() if key != "model_type"})
    except Exception as error:  # transformers checks types with other packages' exceptions
        raise _refusal(CONFIG_NAME, error) from None


def _refusal(file: str, error: Exception) -> UserError:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserError(f"{file} cannot be loaded: {first.strip()}")


def check_positions(hf: HfConfig) -> ExportCheck:
    """Check that factor and max_position_embeddings belong together: 0.25 and 4096, or 16 and 262144."""
    name, model = "positions", hf.model
    reach = model.rope.factor * model.rope.original_max_position_embeddings
    detail = f"factor {model.rope.factor:g} x {model.rope.original_max_position_embeddings} "
    if not math.isclose(reach, model.max_position_embeddings):
        detail += f"is not max_position_embeddings {model.max_position_embeddings}"
        return ExportCheck.warned(name, detail, "export the values of training: the factor changes what is computed")
    return ExportCheck.passed(name, detail + f"= max_position_embeddings {model.max_position_embeddings}")


def check_generation_config(directory: Path, config: dict[str, Any]) -> ExportCheck:
    """Check that generation_config.json exists, loads, and ends responses where config.json does."""
    name = "generation config"
    path = directory / GENERATION_CONFIG_NAME
    if not path.is_file():
        return ExportCheck.warned(
            name, f"there is no {GENERATION_CONFIG_NAME}", "other software looks for eos_token_id there"
        )
    try:
        values = read_json_object(path, "")
        _build_generation_config(values)
    except UserError as error:
        return ExportCheck.failed(name, str(error), COPY)
    here, there = stop_ids_of(values), stop_ids_of(config)
    if here != there:
        detail = f"eos_token_id is {sorted(here) or 'missing'}, in {CONFIG_NAME} {sorted(there) or 'missing'}"
        return ExportCheck.warned(
            name, detail, "let both name every token that ends a response; this project reads this file first"
        )
    return ExportCheck.passed(name, f"eos_token_id {sorted(here)}, as in {CONFIG_NAME}")


def check_denoising(directory: Path, config: dict[str, Any]) -> ExportCheck:
    """Check that generation_config.json says how servers denoise a block, in values that they take."""
    name, values = "denoising", read_if_there(directory / GENERATION_CONFIG_NAME)
    if missing := [key for key in DENOISING_KEYS if values.get(key) is None]:
        remedy = COPY
        if find_model_type(config) is not None:
            remedy = f"python -m model.convert --refresh {shlex.quote(str(directory))}"
        return ExportCheck.warned(
            name, f"{GENERATION_CONFIG_NAME} lacks {some(missing)}: servers take their own", remedy
        )
    policy, steps, threshold = (values[key] for key in DENOISING_KEYS)
    faults = {
        f"diffusion_selection_policy {policy!r} is none of {', '.join(SELECTION_POLICIES)}": policy
        in SELECTION_POLICIES,
        f"max_denoising_steps {steps!r} is no whole number from 1 on": type(steps) is int and steps > 0,
        f"diffusion_confidence_threshold {threshold!r} is no probability above 0": _is_probability(threshold),
    }
    if found := [fault for fault, is_fine in faults.items() if not is_fine]:
        return ExportCheck.failed(name, "; ".join(found), COPY)
    block_size = config.get("block_size")
    if isinstance(block_size, int) and steps < block_size:
        detail = f"max_denoising_steps {steps} is less than block_size {block_size}"
        return ExportCheck.warned(name, detail, "a block may need as many steps as it has tokens")
    return ExportCheck.passed(name, f"{policy}, {threshold}, at most {steps} steps")


def _is_probability(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def _build_generation_config(values: dict[str, Any]) -> None:
    """Build transformers' configuration of generation. Raises: UserError with the reason why it cannot."""
    try:
        GenerationConfig.from_dict(values)
    except Exception as error:  # a value of the wrong kind may raise anything
        raise _refusal(GENERATION_CONFIG_NAME, error) from None


def stop_ids_of(values: dict[str, Any]) -> set[int]:
    """Return eos_token_id of a configuration, one or several."""
    eos = values.get("eos_token_id")
    return {number for number in (eos if isinstance(eos, list) else [eos]) if isinstance(number, int)}


def read_stop_ids(directory: Path, config: dict[str, Any]) -> set[int]:
    """Return the tokens that end a response: generation_config.json's, else config.json's."""
    return stop_ids_of(read_if_there(directory / GENERATION_CONFIG_NAME)) or stop_ids_of(config)


def read_if_there(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or damaged, which the check of the file itself reports."""
    try:
        return read_json_object(path, "missing")
    except UserError:
        return {}
