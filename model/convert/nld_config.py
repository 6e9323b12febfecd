"""Writes config.json and generation_config.json of a tri-mode (NLD) export: the manifest in the released keys."""

from dataclasses import asdict
from importlib import metadata
from typing import Any

from conf.schema import ModelConfig, StageConfig
from model.checkpoint.layout import CheckpointManifest
from model.convert.processor_config import IMAGE_SETTINGS
from model.convert.vision_config import describe_vision
from model.export.shipped_code import ARCHITECTURES, NLD_TYPE, VERSION_KEY, VLM_TYPE, build_auto_map
from model.hf.options import BLOCK_DIFFUSION_THRESHOLD

# Keys of the released format that no field of the manifest decides. An imported export keeps its own values.
_RELEASED_VALUES: dict[str, Any] = {
    "dlm_paradigm": "bidirectional",  # how a block is decoded; training is block-causal
    "dlm_loss_weight": StageConfig.diffusion_weight,
    "ar_loss_weight": 1.0,
    "dp_varying_mask_ratio": True,  # every document has its own noise level
    "bos_token_id": 1,
}
# The same of models that read images.
_RELEASED_VLM_VALUES = {"dlm_type": "llada", "dlm_arch": "encoder"}
# What this model has not, said explicitly: a reader may take a default of its own for a key that is not there.
ABSENT: dict[str, Any] = {
    "sliding_window": None,
    "pad_token_id": None,  # the start checkpoints' (11) is the instruct model's end of turn
}
DECODING_DEFAULTS = "decoding_defaults"  # in a manifest's `export`: for generation_config.json, not for config.json
_OF_OTHER_FILES = (DECODING_DEFAULTS, IMAGE_SETTINGS)
_DROPPED = {VERSION_KEY, "_name_or_path", "dtype"}  # written by transformers on every save


def build_nld_config(manifest: CheckpointManifest, model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Build the whole config.json. dtype: `bfloat16` or `float32`, of the exported tensors."""
    mask_token_id = manifest.tokenizer["mask_token_id"]
    eos = _stop_ids(manifest.export.get("eos_token_id"), manifest.eos_token_id)
    decided = describe_model(model, dtype, mask_token_id, manifest.block_size, eos)
    values = {key: value for key, value in manifest.export.items() if key not in _OF_OTHER_FILES}
    released = _RELEASED_VALUES | (_RELEASED_VLM_VALUES if model.vision else {})
    return released | values | decided | {VERSION_KEY: read_transformers_version()}


def build_generation_config(config: dict[str, Any], imported: dict[str, Any]) -> dict[str, Any]:
    """Build the whole generation_config.json from config.json; servers read from it how blocks are denoised.

    imported: what the checkpoint that training began with says there beyond the ids of tokens.

    They are denoised as these models are released: every masked position that reaches the threshold is committed in a
    step, at least one, so that a block is full after block_size steps.
    """
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    return ids | {
        "max_denoising_steps": config.get("block_size", StageConfig.block_size),
        "diffusion_selection_policy": "confidence_threshold",
        "diffusion_confidence_threshold": BLOCK_DIFFUSION_THRESHOLD,
        **imported,
    }


def read_transformers_version() -> str:
    """Return the version for config.json: without one, transformers 4.57.3 and 5.0 take the tokenizer for a broken one.

    They warn of Mistral's old pre-tokenizer for every vocabulary above 100,000 unless the file says that it is newer.
    """
    return metadata.version("transformers")


def select_preserved_values(values: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Select the keys of an imported export that no manifest field decides and a later export must restore."""
    decided = describe_model(model, "", 0, 0, 0).keys() | _DROPPED
    return {key: value for key, value in values.items() if key not in decided}


def _stop_ids(imported: Any, eos_token_id: int) -> int | list[int]:
    """Return all imported ends of a response, unless training has chosen another one since."""
    return imported if isinstance(imported, list) and eos_token_id in imported else eos_token_id


def describe_model(
    model: ModelConfig, dtype: str, mask_token_id: int, block_size: int, eos_token_id: int | list[int]
) -> dict[str, Any]:
    """Return the keys of config.json that follow from the model; dtype: `bfloat16` or `float32`."""
    model_type = get_model_type(model)
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "auto_map": build_auto_map(model_type),
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": model.rms_norm_eps,
        "initializer_range": model.init_std,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_parameters": _rope_parameters(model),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "mask_token_id": mask_token_id,
        "block_size": block_size,
        "eos_token_id": eos_token_id,
        **ABSENT,
        **(describe_vision(model.vision) if model.vision else {}),
    }


def get_model_type(model: ModelConfig) -> str:
    """Return the model_type of an export of `model`."""
    return VLM_TYPE if model.vision else NLD_TYPE


def _rope_parameters(model: ModelConfig) -> dict[str, Any]:
    values = {"rope_type": "yarn", **asdict(model.rope)}
    if model.vision:  # as released
        values["type"] = "yarn"
    values["rope_theta"] = values.pop("theta")
    if values["truncate"]:  # the released files leave out transformers' default
        del values["truncate"]
    return values
