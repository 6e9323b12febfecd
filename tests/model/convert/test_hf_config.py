"""config.json means to us what it means to transformers, in every spelling; what we do not compute is refused."""

import json
import math
from typing import Any

import pytest
import torch
from transformers import Ministral3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from conf.system.errors import UserError
from model.attention.rotation import RotationBuilder
from model.convert.hf_config import read_hf_config

BASE = {
    "model_type": "ministral3",
    "vocab_size": 384,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 512, "llama_4_scaling_beta": 0.1}
SPELLINGS = {
    "complete": {"rope_parameters": ROPE | {"rope_theta": 1e6, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "factor below one": {"rope_parameters": ROPE | {"rope_theta": 1e6, "factor": 0.25}},
    "old rope_scaling": {"rope_scaling": ROPE | {"mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 1e9},
    "type instead of rope_type": {"rope_parameters": {"type": "yarn", **ROPE}, "rope_theta": 1e5},
    "theta in both places": {"rope_parameters": ROPE | {"rope_theta": 1e6}, "rope_theta": 1e9},
    "no theta": {"rope_parameters": ROPE},
    "no truncation": {"rope_parameters": ROPE | {"rope_theta": 1e6, "truncate": False}},
    "other betas": {"rope_parameters": ROPE | {"rope_theta": 1e6, "beta_fast": 8.0, "beta_slow": 2.0}},
    "one mscale": {"rope_parameters": ROPE | {"rope_theta": 1e6, "mscale": 2.0}},
    "unequal mscales": {"rope_parameters": ROPE | {"rope_theta": 1e6, "mscale": 2.0, "mscale_all_dim": 0.5}},
    "no original context": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.2}},
    "nothing about rope": {},
    "theta alone": {"rope_theta": 1e9},
}


def write(directory, values):
    (directory / "config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize("name", SPELLINGS)
def test_rotary_parameters_mean_what_transformers_makes_of_them(tmp_path, name):
    values = BASE | SPELLINGS[name]
    theirs: Any = Ministral3Config.from_dict(json.loads(json.dumps(values)))
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    ours = read_hf_config(write(tmp_path, values)).model
    rotations = RotationBuilder(ours.rope, ours.head_dim)
    torch.testing.assert_close(rotations.inverse_frequencies, frequencies)
    assert math.isclose(rotations.attention_factor, attention_factor)
    assert ours.rope.llama_4_scaling_beta == theirs.rope_parameters["llama_4_scaling_beta"]
    assert ours.rope.original_max_position_embeddings == theirs.rope_parameters["original_max_position_embeddings"]
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


def test_dimensions_are_read_literally(tmp_path):
    model = read_hf_config(write(tmp_path, BASE | {"rms_norm_eps": 1e-6, "initializer_range": 0.01})).model
    assert (model.hidden_size, model.head_dim, model.query_width, model.key_value_width) == (48, 64, 256, 128)
    assert (model.num_layers, model.ffn_hidden_size, model.vocab_size) == (2, 80, 384)
    assert (model.rms_norm_eps, model.init_std, model.max_position_embeddings) == (1e-6, 0.01, 4096)


def test_the_wrapper_is_read_from_its_text_config(tmp_path):
    text = BASE | {"tie_word_embeddings": True}
    wrapper = {"model_type": "mistral3", "text_config": text, "tie_word_embeddings": False, "hidden_size": 1}
    config = read_hf_config(write(tmp_path, wrapper))
    assert config.tied and config.model.hidden_size == 48 and not config.is_nld
    del text["tie_word_embeddings"]
    assert not read_hf_config(write(tmp_path, wrapper | {"tie_word_embeddings": True})).tied


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_size": None}, "does not give hidden_size"),
        ({"head_dim": None}, "does not give head_dim"),
        ({"num_hidden_layers": "2"}, "does not give num_hidden_layers"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights .gptq.: only fp8 is read"),
        ({"quantization_config": 8}, "quantised weights .quantization_config.: only fp8"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, "weight_block_size 128"),
        ({"rope_parameters": ROPE | {"rope_type": "llama3"}}, "rope_type 'llama3'"),
        ({"rope_parameters": {"factor": 2.0}}, "rope_type 'default'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "without llama_4_scaling_beta"),
        ({"rope_parameters": {"rope_type": "yarn", "llama_4_scaling_beta": 0.1}}, "without factor"),
        ({"rope_parameters": ROPE | {"short_factor": []}}, "does not know: short_factor"),
        ({"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": ROPE | {"attention_factor": 3.0}}, "attention_factor 3.0"),
        ({"rope_parameters": ROPE, "original_max_position_embeddings": 7}, "two values of original_max"),
        ({"rope_parameters": 3}, "not an object"),
        ({"rope_parameters": ROPE | {"factor": "16"}}, "factor='16': it must be a number"),
        ({"rope_parameters": ROPE | {"rope_theta": None}}, "without a value of rope_theta"),
        ({"rope_parameters": ROPE | {"beta_fast": float("inf")}}, "beta_fast=inf: it must be a number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small': it must be a number"),
    ],
)
def test_what_we_do_not_compute_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_hf_config(write(tmp_path, BASE | changes))


def test_quantisation_inside_the_text_config_is_seen(tmp_path):
    for quantization, block in (({}, None), ({"weight_block_size": [64, 128]}, (64, 128))):
        text = BASE | {"quantization_config": {"quant_method": "fp8"} | quantization}
        config = read_hf_config(write(tmp_path, {"model_type": "mistral3", "text_config": text}))
        assert config.is_fp8
        assert config.fp8_block == block
    text["quantization_config"] = {"quant_method": "awq"}
    with pytest.raises(UserError, match="only fp8 is read"):
        read_hf_config(write(tmp_path, {"model_type": "mistral3", "text_config": text}))


def test_an_export_with_quantised_weights_is_refused(tmp_path):
    values = BASE | {"model_type": "nemotron_labs_diffusion", "quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(UserError, match="exports are read in bf16 or fp32"):
        read_hf_config(write(tmp_path, values))


def test_a_wrapper_around_another_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"text_config\.model_type 'mistral'"):
        read_hf_config(write(tmp_path, {"model_type": "mistral3", "text_config": BASE | {"model_type": "mistral"}}))


def test_a_missing_or_damaged_file_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_hf_config(tmp_path)
