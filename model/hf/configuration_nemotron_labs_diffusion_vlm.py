"""Configuration of an exported vision-language checkpoint (`config.json`: model_type nemotron_labs_diffusion_vlm)."""

from typing import Any

from transformers import PixtralVisionConfig

from .configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig, default_rope_parameters


def default_vision_config() -> dict[str, Any]:
    """Return the vision tower of the released model, which is Ministral 3's."""
    return {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 64,
        "patch_size": 14,
        "image_size": 1540,
        "num_channels": 3,
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }


class NemotronLabsDiffusionVLMConfig(NemotronLabsDiffusionConfig):
    """The text model's keys at the root, and those of the vision tower and the projector.

    Attributes:
        vision_config: of transformers' Pixtral tower.
        spatial_merge_size: patches along each side that become one feature.
        projector_hidden_act, multimodal_projector_bias, vision_feature_layer: one value each, checked.
        dlm_type, dlm_arch: for other software that reads them; nothing here depends on them.

    Raises:
        ValueError: as NemotronLabsDiffusionConfig, or a tower or projector that this code does not compute.
    """

    model_type = "nemotron_labs_diffusion_vlm"
    # Declared as the base class of every version reads it.
    sub_configs = {"vision_config": PixtralVisionConfig}  # noqa: RUF012 # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        vision_config: dict[str, Any] | PixtralVisionConfig | None = None,
        spatial_merge_size: int = 2,
        projector_hidden_act: str = "gelu",
        multimodal_projector_bias: bool = False,
        vision_feature_layer: int = -1,
        dlm_type: str = "llada",
        dlm_arch: str = "encoder",
        rope_parameters: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        given = default_vision_config() if vision_config is None else vision_config
        self.vision_config = given if isinstance(given, PixtralVisionConfig) else _read_vision_config(given)
        self.spatial_merge_size = spatial_merge_size
        self.projector_hidden_act = projector_hidden_act
        self.multimodal_projector_bias = multimodal_projector_bias
        self.vision_feature_layer = vision_feature_layer
        self.dlm_type = dlm_type
        self.dlm_arch = dlm_arch
        if rope_parameters is None:
            rope_parameters = default_rope_parameters() | {"type": "yarn"}
        super().__init__(rope_parameters=rope_parameters, **kwargs)
        _check_vision(self)

    @property
    def pixels_per_feature(self) -> int:
        """Pixels along each side of a feature."""
        patch_size: Any = self.vision_config.patch_size
        return patch_size * self.spatial_merge_size

    def to_dict(self) -> dict[str, Any]:
        """Return what is written to config.json."""
        values = super().to_dict()
        rope = values.get("vision_config", {}).get("rope_parameters")
        if rope and rope.get("rope_type") == "axial":
            rope["rope_type"] = "default"  # the released name, which every version of transformers reads
        return values


def _read_vision_config(given: dict[str, Any]) -> PixtralVisionConfig:
    """Build the tower's configuration; raise ValueError for a tower of another kind."""
    if given.get("model_type", "pixtral") != "pixtral":
        raise ValueError(f"vision_config has model_type {given['model_type']!r}; the tower of this family is 'pixtral'")
    values = {key: value for key, value in given.items() if key != "model_type"}
    values["rope_parameters"] = dict(values.get("rope_parameters") or default_vision_config()["rope_parameters"])
    return PixtralVisionConfig(**values)


def _check_vision(config: NemotronLabsDiffusionVLMConfig) -> None:
    """Raise ValueError unless the keys describe the one projector of this family."""
    computed = {"projector_hidden_act": "gelu", "multimodal_projector_bias": False, "vision_feature_layer": -1}
    for name, value in computed.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name} is {getattr(config, name)!r}, but the projector of this family has {value!r}")
    tower: Any = config.vision_config
    if tower.head_dim * tower.num_attention_heads != tower.hidden_size:
        raise ValueError(
            f"vision_config has hidden_size {tower.hidden_size}, but {tower.num_attention_heads} heads of "
            f"{tower.head_dim}"
        )


# save_pretrained then writes auto_map and copies this file and the one it imports.
NemotronLabsDiffusionVLMConfig.register_for_auto_class()
