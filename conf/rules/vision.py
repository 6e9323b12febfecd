"""Rules of the vision tower, and of the parts of a model that a stage trains."""

from collections.abc import Callable

from conf.rules.violations import Violations
from conf.schema import Dtype, ModelPart, RunConfig, VisionPrecision

PIXELS_PER_FEATURE = 28  # of the family, in each direction (model/hf/image_loading.py)


def _heads_share_the_tower(config: RunConfig) -> Violations:
    vision = config.model.vision
    if vision is None or vision.num_attention_heads <= 0:
        return  # conf/rules/ranges.py says so
    if vision.hidden_size % (4 * vision.num_attention_heads):
        yield (
            f"model.vision.hidden_size={vision.hidden_size} does not give each of model.vision.num_attention_heads="
            f"{vision.num_attention_heads} heads a multiple of 4; rotary embeddings turn pairs by row and by column"
        )


def _features_are_those_of_the_data(config: RunConfig) -> Violations:
    vision = config.model.vision
    if vision is not None and vision.pixels_per_feature != PIXELS_PER_FEATURE:
        yield (
            f"model.vision.patch_size={vision.patch_size} * model.vision.merge_size={vision.merge_size} must be "
            f"{PIXELS_PER_FEATURE}: prepared data have one token for so many pixels in each direction"
        )


def _parts_that_are_set_exist(config: RunConfig) -> Violations:
    stage, has_tower = config.stage, config.model.vision is not None
    if has_tower:
        return
    for part in stage.freeze:
        if part is not ModelPart.text:
            yield f"stage.freeze names {part.value}, and model.vision is null; choose a model that reads images"
    for key in ("tower_lr", "projector_lr"):
        if getattr(stage, key) != 1:
            yield f"stage.{key}={getattr(stage, key):g} has no effect, for model.vision is null; leave it out"


def _something_is_trained(config: RunConfig) -> Violations:
    parts = set(ModelPart) if config.model.vision else {ModelPart.text}
    if parts <= set(config.stage.freeze):
        names = ", ".join(part.value for part in config.stage.freeze)
        yield f"stage.freeze={names} leaves nothing to train; leave a part out"


def _rounded_vision_leaves_the_text_exact(config: RunConfig) -> Violations:
    if config.precision.vision is VisionPrecision.tf32 and config.precision.dtype is Dtype.fp32:
        yield (
            "precision.vision=tf32 would round the matmuls of the whole model, for precision.dtype is fp32; use "
            "precision.vision=fp32"
        )


VISION_RULES: list[Callable[[RunConfig], Violations]] = [
    _heads_share_the_tower,
    _features_are_those_of_the_data,
    _parts_that_are_set_exist,
    _something_is_trained,
    _rounded_vision_leaves_the_text_exact,
]
