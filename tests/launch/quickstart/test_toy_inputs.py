"""The toy start checkpoint has the released format: transformers loads it, and its tensors have the released names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoTokenizer

from conf.composition.compose import compose_run_config
from conf.schema import ModelConfig
from data_pipeline.toy.tokenizer import save_tokenizer, train_tokenizer
from launch.quickstart.toy_inputs import write_start_checkpoint


@pytest.fixture(scope="module")
def model_config() -> ModelConfig:
    return compose_run_config(["experiment=quickstart_ar", "init_from=null"]).model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, model_config: ModelConfig) -> Path:
    directory = tmp_path_factory.mktemp("start")
    save_tokenizer(train_tokenizer(["def f(x): return x + 1\n" * 3], vocab_size=360), directory / "tokenizer")
    write_start_checkpoint(model_config, directory / "tokenizer", directory / "start", seed=7)
    return directory / "start"


def test_tensor_names_are_the_released_ones(checkpoint: Path, model_config: ModelConfig) -> None:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        text = {name for name in file.keys() if name.startswith("language_model.")}  # noqa: SIM118
        others = {name.split(".")[0] for name in file.keys()} - {"language_model"}  # noqa: SIM118
        dtypes = {file.get_slice(name).get_dtype() for name in text}
    assert len(text) == 9 * model_config.num_layers + 2, "no head: it is tied to the embedding"
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in text
    assert others == {"vision_tower", "multi_modal_projector"}
    assert dtypes == {"BF16"}


def test_config_has_what_an_importer_reads(checkpoint: Path, model_config: ModelConfig) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    text, rope = config["text_config"], config["text_config"]["rope_parameters"]
    assert (config["model_type"], text["model_type"]) == ("mistral3", "ministral3")
    assert config["tie_word_embeddings"] is text["tie_word_embeddings"] is True
    assert text["head_dim"] == model_config.head_dim != text["hidden_size"] // text["num_attention_heads"]
    assert (rope["rope_type"], rope["factor"], rope["llama_4_scaling_beta"]) == ("yarn", 16.0, 0.1)


def test_transformers_loads_it_and_computes(checkpoint: Path, model_config: ModelConfig) -> None:
    loaded: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True, dtype=torch.float32)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    logits = model(torch.arange(101, 121)[None]).logits
    assert logits.shape == (1, 20, model_config.vocab_size)
    assert logits.isfinite().all()
    assert AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids("<SPECIAL_100>") == 100
