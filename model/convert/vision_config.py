"""Reads and writes what config.json says of vision tower and projector; Ministral 3 and exports have the same keys."""

from pathlib import Path
from typing import Any

from conf.schema import VisionConfig
from conf.system.errors import UserError
from model.hf.image_loading import PIXELS_PER_FEATURE

# Name in vision_config -> field of VisionConfig; every one must be there: a default would be another tower.
_DIMENSIONS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "patch_size": "patch_size",
    "image_size": "image_size",
}
# What the one tower and the one projector of this family have, as files say it or as transformers takes it.
_TOWER: dict[str, Any] = {"model_type": "pixtral", "num_channels": 3, "hidden_act": "silu"}
PROJECTOR_KEYS: dict[str, Any] = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": False,
    "vision_feature_layer": -1,
}
_IF_ABSENT = {"hidden_act": "gelu"}  # transformers' default of a key, where it is not this family's value
_ROPE_TYPES = ("default", "axial")  # the released name, and transformers' own for the same


def read_vision_config(values: dict[str, Any], path: Path) -> VisionConfig:
    """Read the tower from a whole config.json.

    path: of the file, for messages.

    Raises:
        UserError: there is no vision_config, or one of another tower or projector than this family's.
    """
    tower = values.get("vision_config")
    if not isinstance(tower, dict):
        raise UserError(f"{path} has no vision_config: give a Ministral 3 checkpoint with its vision tower")
    missing = [key for key in _DIMENSIONS if type(tower.get(key)) is not int or tower[key] < 1]
    if missing:
        raise UserError(f"{path} does not give {', '.join(missing)} of vision_config as whole numbers from 1 on")
    for where, key, expected in [
        *(("vision_config.", key, value) for key, value in _TOWER.items()),
        *(("", key, value) for key, value in PROJECTOR_KEYS.items()),
    ]:
        found = (tower if where else values).get(key, _IF_ABSENT.get(key, expected))
        if found != expected:
            raise UserError(f"{path} has {where}{key}={found!r}: this project computes {expected!r} only")
    merge = values.get("spatial_merge_size", VisionConfig.merge_size)
    if type(merge) is not int or merge < 1:
        raise UserError(f"{path} has spatial_merge_size={merge!r}: it must be a whole number from 1 on")
    dimensions = {ours: tower[theirs] for theirs, ours in _DIMENSIONS.items()}
    vision = VisionConfig(**dimensions, merge_size=merge, rope_theta=_read_theta(tower, path))
    head_dim = tower.get("head_dim", vision.head_dim)
    if vision.num_attention_heads * head_dim != vision.hidden_size:
        raise UserError(
            f"{path} has {vision.num_attention_heads} heads of {head_dim} in vision_config, which are not "
            f"hidden_size {vision.hidden_size} together: it is another tower than Pixtral's"
        )
    if vision.pixels_per_feature != PIXELS_PER_FEATURE:
        raise UserError(
            f"{path} has features of {vision.patch_size} * {merge} pixels (patch_size * spatial_merge_size): the image "
            f"processor of this family makes images for {PIXELS_PER_FEATURE}"
        )
    return vision


def _read_theta(tower: dict[str, Any], path: Path) -> float:
    """Read the base of the rotary frequencies, which older files state outside of rope_parameters."""
    rope = tower.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else rope
    theta = rope.get("rope_theta", tower.get("rope_theta", VisionConfig.rope_theta)) if isinstance(rope, dict) else None
    if kind not in _ROPE_TYPES or isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise UserError(
            f"{path} has rope_parameters {rope!r} in vision_config: this project computes rope_type "
            f"{_ROPE_TYPES[0]!r} with a positive rope_theta only"
        )
    return float(theta)


def describe_vision(vision: VisionConfig) -> dict[str, Any]:
    """Return the keys of an export's config.json that follow from the tower, in the released words."""
    tower = {theirs: getattr(vision, ours) for theirs, ours in _DIMENSIONS.items()}
    rope = {"rope_theta": vision.rope_theta, "rope_type": _ROPE_TYPES[0]}
    return {
        "vision_config": _TOWER | tower | {"head_dim": vision.head_dim, "rope_parameters": rope},
        "spatial_merge_size": vision.merge_size,
        **PROJECTOR_KEYS,
    }
