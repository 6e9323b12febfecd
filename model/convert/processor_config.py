"""Writes processor_config.json of an export with images, which AutoProcessor reads, and keeps what another one says.

The tokenizer lies beside it; how pictures are prepared stands in it (model/hf/image_processing_..._vlm.py).
"""

from pathlib import Path
from typing import Any

from conf.schema import VisionConfig
from conf.system.errors import UserError
from conf.system.json_file import read_optional_json
from model.export.shipped_code import (
    CLASS_PREFIXES,
    IMAGE_PROCESSOR_MAP,
    PROCESSOR_CONFIG_NAME,
    PROCESSOR_MAP,
    VLM_TYPE,
)
from model.hf.image_loading import LONGEST_EDGE, PIXELS_PER_FEATURE

IMAGE_SETTINGS = "image_processor"  # in a manifest's `export`: for processor_config.json, not for config.json
RULES = ("mistral", "transformers")


def build_processor_config(vision: VisionConfig, imported: dict[str, Any]) -> dict[str, Any]:
    """Build the whole processor_config.json.

    imported: what the checkpoint that training began with says of longest_edge and rules.
    """
    prefix = CLASS_PREFIXES[VLM_TYPE]
    return {
        "auto_map": PROCESSOR_MAP,
        "processor_class": f"{prefix}Processor",
        "image_processor": {
            "auto_map": IMAGE_PROCESSOR_MAP | PROCESSOR_MAP,
            "image_processor_type": f"{prefix}ImageProcessor",
            "longest_edge": find_longest_edge(vision),
            "rules": RULES[0],
            **imported,
        },
    }


def find_longest_edge(vision: VisionConfig) -> int:
    """Return the longest side in pixels that images are shrunk to: the released one, or less for a smaller tower."""
    return min(LONGEST_EDGE, vision.image_size // PIXELS_PER_FEATURE * PIXELS_PER_FEATURE)


def read_image_settings(directory: Path, vision: VisionConfig) -> dict[str, Any]:
    """Read longest_edge and rules from processor_config.json of an export, for a later one; {} where it has none.

    Raises: UserError if they are no settings of the image processor, or larger than the tower takes.
    """
    path = directory / PROCESSOR_CONFIG_NAME
    values = read_optional_json(path).get("image_processor")
    values = values if isinstance(values, dict) else {}
    settings = {key: values[key] for key in ("longest_edge", "rules") if key in values}
    edge, rules = settings.get("longest_edge", PIXELS_PER_FEATURE), settings.get("rules", RULES[0])
    most = vision.image_size // PIXELS_PER_FEATURE * PIXELS_PER_FEATURE
    if type(edge) is not int or not PIXELS_PER_FEATURE <= edge <= most:
        raise UserError(
            f"{path} has longest_edge {edge!r}: it must be a whole number of pixels from {PIXELS_PER_FEATURE} to "
            f"{most}, the most that the tower takes"
        )
    if rules not in RULES:
        raise UserError(f"{path} has rules {rules!r}: choose among {', '.join(RULES)}")
    return settings
