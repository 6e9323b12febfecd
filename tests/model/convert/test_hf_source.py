"""Every released form of a Ministral 3 checkpoint gives the same Megatron tensors; incomplete ones are refused."""

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.system.errors import UserError
from model.convert.hf_source import HfSource
from model.convert.mapping import HEAD, split_views
from tests.helpers.tiny_checkpoints import make_ministral3_vlm, tiny_model_config


def text_weights(network):
    """Return suffix of the table -> weight, from transformers' live model."""
    language_model = getattr(network.model, "language_model", network.model)
    return dict(language_model.named_parameters()) | {HEAD: network.get_output_embeddings().weight}


def assert_same_weights(directory, network):
    expected = text_weights(network)
    with HfSource(directory) as source:
        for entry in source.table:
            fused = source.read(entry)
            assert fused.dtype == source.dtype and tuple(fused.shape) == entry.megatron_shape
            for suffix, view in zip(entry.hf, split_views(fused, entry, source.config.model), strict=True):
                assert torch.equal(view.reshape(entry.hf[suffix]), expected.pop(suffix)), suffix
        assert not expected
        return source


@pytest.mark.parametrize("spelling", ["vision", "transformers5", "text"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [True, False])
def test_every_spelling_gives_the_weights_of_transformers(tmp_path, spelling, tied, shards):
    network = make_ministral3_vlm(tmp_path, spelling=spelling, tied=tied, shards=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    source = assert_same_weights(tmp_path, network)
    assert source.head_is_copied == tied
    assert source.num_skipped == (0 if spelling == "text" else 15)


@pytest.mark.parametrize("factor", [16.0, 0.25])
def test_the_config_is_the_one_saved(tmp_path, factor):
    make_ministral3_vlm(tmp_path / "tiny", factor=factor)
    with HfSource(tmp_path / "tiny") as source:
        assert source.config.model == tiny_model_config(factor=factor)


def test_fp32_weights_stay_fp32_and_can_be_rounded(tmp_path):
    network: Any = make_ministral3_vlm(tmp_path, dtype=torch.float32)
    with HfSource(tmp_path) as source:
        assert source.dtype == torch.float32
        rounded = source.read(source.table[0], torch.bfloat16)
    assert torch.equal(rounded, network.get_input_embeddings().weight.bfloat16())


def test_mixed_formats_are_read_into_the_wider_one(tmp_path):
    network = make_ministral3_vlm(tmp_path)
    rewrite(
        tmp_path, lambda weights: weights.update({name: w.float() for name, w in weights.items() if "norm" in name})
    )
    assert_same_weights(tmp_path, network.float())


def rewrite(directory, change):
    """Change the tensors of model.safetensors in place."""
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    make_ministral3_vlm(directory, tied=False)
    return directory


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoint")


PREFIX = "language_model.model."
QUERY = PREFIX + "layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(QUERY), f"lacks tensors of the model in its config.json: {QUERY}"),
        (lambda w: w.pop("language_model.lm_head.weight"), "no head .*tie_word_embeddings"),
        (lambda w: w.pop(PREFIX + "embed_tokens.weight"), "embed_tokens.weight or .* has 0 of them"),
        (lambda w: w.update({"model.embed_tokens.weight": torch.zeros(1)}), "has 2 of them"),
        (lambda w: w.update({PREFIX + "layers.0.self_attn.q_proj.bias": torch.zeros(2)}), "does not have.*q_proj.bias"),
        (lambda w: w.update({PREFIX + "layers.9.input_layernorm.weight": torch.zeros(2)}), "num_hidden_layers too"),
        (lambda w: w.update({QUERY: w[QUERY][1:].clone()}), rf"{QUERY} has shape \[63, 48\].* makes it \[64, 48\]"),
        (lambda w: w.update({QUERY: w[QUERY].to(torch.float8_e4m3fn)}), f"{QUERY} has format F8_E4M3 without"),
        (lambda w: w.update({QUERY + "_scale_inv": torch.ones(1)}), "does not have.*weight_scale_inv"),
        (lambda w: w.update({QUERY: torch.zeros(64, 48, dtype=torch.int32)}), f"{QUERY} has format I32"),
    ],
)
def test_wrong_tensors_are_named_with_the_remedy(checkpoint, change, message):
    rewrite(checkpoint, change)
    with pytest.raises(UserError, match=message):
        HfSource(checkpoint)


def test_a_config_of_another_size_is_seen_in_the_shapes(checkpoint):
    path = checkpoint / "config.json"
    values = json.loads(path.read_text())
    values["text_config"]["intermediate_size"] = 96
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"config\.json makes it"):
        HfSource(checkpoint)
