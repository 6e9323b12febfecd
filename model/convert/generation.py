"""What a Hugging Face checkpoint says of decoding: the tokens that end a response, and sampling defaults.

generation_config.json goes before config.json, as in decoding (model/hf/options.py, resolve_stop_ids).
"""

from pathlib import Path
from typing import Any

from conf.system.errors import UserError
from conf.system.json_file import read_optional_json
from model.export.shipped_code import CONFIG_NAME, GENERATION_CONFIG_NAME

# Of generation_config.json; an import hands them on to the exports that follow.
SAMPLING_KEYS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
DECODING_KEYS = (*SAMPLING_KEYS, "diffusion_selection_policy", "diffusion_confidence_threshold")


def read_generation_config(directory: Path) -> dict[str, Any]:
    """Read generation_config.json; empty if there is none. Raises: UserError if it is damaged."""
    return read_optional_json(directory / GENERATION_CONFIG_NAME)


def list_stop_ids(directory: Path, config_value: Any, vocab_size: int) -> list[int]:
    """Return the tokens that end a response, in order; none if neither file names any.

    config_value: eos_token_id of config.json, a number or several, or None.
    Raises: UserError if they are no ids of the vocabulary.
    """
    generation = read_generation_config(directory).get("eos_token_id")
    name, value = (CONFIG_NAME, config_value) if generation is None else (GENERATION_CONFIG_NAME, generation)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise UserError(
                f"{directory / name} has eos_token_id {value!r}: it must be one or several token ids below "
                f"vocab_size {vocab_size}"
            )
    return list(dict.fromkeys(ids))


def select_decoding_defaults(directory: Path) -> dict[str, Any]:
    """Select what generation_config.json says beyond the ids of tokens, for a later export."""
    values = read_generation_config(directory)
    return {key: values[key] for key in DECODING_KEYS if values.get(key) is not None}
