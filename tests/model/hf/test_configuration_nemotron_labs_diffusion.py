"""Released keys load, unknown keys survive, other architectures are refused."""

import json

import pytest

from model.hf.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig, default_rope_parameters

RELEASED = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig"},
    "ar_loss_weight": 1.0,
    "block_size": 32,
    "bos_token_id": 1,
    "dlm_loss_weight": 0.3,
    "dlm_paradigm": "bidirectional",
    "dp_varying_mask_ratio": True,
    "eos_token_id": 11,
    "head_dim": 128,
    "hidden_size": 3072,
    "mask_token_id": 100,
    "model_type": "nemotron_labs_diffusion",
    "num_hidden_layers": 26,
    "rope_parameters": {**default_rope_parameters(), "factor": 0.25},
    "some_key_of_a_later_release": {"a": [1, 2]},
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def test_released_keys_survive_a_round_trip(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    NemotronLabsDiffusionConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    expected = {key: value for key, value in RELEASED.items() if key not in ("torch_dtype", "auto_map")}
    assert {key: saved[key] for key in expected} == expected
    assert saved["dtype"] == "bfloat16"
    assert saved["pad_token_id"] is None and saved["sliding_window"] is None


def test_truncate_survives_a_round_trip(tmp_path):
    rope = {**default_rope_parameters(), "truncate": False}
    NemotronLabsDiffusionConfig(rope_parameters=rope).save_pretrained(tmp_path)
    assert NemotronLabsDiffusionConfig.from_pretrained(tmp_path).rope_parameters == rope


def without(key):
    return {name: value for name, value in default_rope_parameters().items() if name != key}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"attention_bias": True}, "biases"),
        ({"mlp_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "not a multiple"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_type 'default'"),
        ({"rope_parameters": without("llama_4_scaling_beta")}, "lacks llama_4_scaling_beta"),
        ({"rope_parameters": without("factor")}, "factor"),
    ],
)
def test_another_architecture_is_refused(keys, message):
    with pytest.raises((ValueError, KeyError), match=message):
        NemotronLabsDiffusionConfig(**keys)
