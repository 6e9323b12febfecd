"""config.json of the vision-language model: the released keys, and what this code does not compute."""

import json

import pytest

from model.hf.configuration_nemotron_labs_diffusion_vlm import NemotronLabsDiffusionVLMConfig
from tests.helpers.tiny_vlm import make_vlm, make_vlm_config

RELEASED = {
    "model_type": "nemotron_labs_diffusion_vlm",
    "vocab_size": 131073,
    "hidden_size": 4096,
    "num_hidden_layers": 34,
    "mask_token_id": 100,
    "dlm_type": "llada",
    "dlm_arch": "encoder",
    "spatial_merge_size": 2,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": False,
    "vision_feature_layer": -1,
    "vision_config": {
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
    },
}


def assert_contains(values, expected):
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_contains(values[key], value)
        else:
            assert values[key] == value, key


def test_the_default_is_the_released_8b_with_131072_tokens(tmp_path):
    NemotronLabsDiffusionVLMConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert_contains(written, RELEASED | {"vocab_size": 131072})
    assert written["rope_parameters"]["type"] == "yarn" and "text_config" not in written
    assert written["auto_map"] == {
        "AutoConfig": "configuration_nemotron_labs_diffusion_vlm.NemotronLabsDiffusionVLMConfig"
    }


def test_the_released_keys_load_and_are_written_as_they_were(tmp_path):
    (tmp_path / "released").mkdir()
    (tmp_path / "released" / "config.json").write_text(json.dumps(RELEASED))
    config = NemotronLabsDiffusionVLMConfig.from_pretrained(tmp_path / "released")
    assert (config.vocab_size, config.pixels_per_feature, config.vision_config.head_dim) == (131073, 28, 64)
    config.save_pretrained(tmp_path / "saved")
    assert_contains(json.loads((tmp_path / "saved" / "config.json").read_text()), RELEASED)
    again = NemotronLabsDiffusionVLMConfig.from_pretrained(tmp_path / "saved")
    assert again.to_dict() == config.to_dict()


def test_one_more_token_than_the_text_model_has_is_one_more_in_embedding_and_head():
    model = make_vlm(vocab_size=65)
    assert len(model.encoder.embed_tokens.weight) == len(model.diffusion_head.weight) == 65


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"projector_hidden_act": "relu"},
            "projector_hidden_act is 'relu', but the projector .* has 'gelu'",
        ),
        ({"multimodal_projector_bias": True}, "multimodal_projector_bias is True"),
        ({"vision_feature_layer": -2}, "vision_feature_layer is -2"),
        ({"vision": {"model_type": "siglip"}}, "vision_config has model_type 'siglip'"),
        ({"hidden_act": "gelu"}, "the MLP of this family is SwiGLU"),
    ],
    ids=str,
)
def test_what_this_code_does_not_compute_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_vlm_config(**change)
