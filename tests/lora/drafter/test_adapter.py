"""The adapter: its size at every released shape, what it leaves alone, and that PEFT reads what is written."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from conf.composition.compose import compose_run_config
from conf.schema.drafter import AdapterConfig
from lora.drafter.adapter import attach_new_adapter, check_trainable, count_adapter_parameters, save_adapter
from model.checkpoint.checksums import find_damage
from model.export.adapter_weights import WEIGHTS_FILE
from model.export.draft_adapter import check_adapter
from model.hf.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig
from model.hf.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel
from tests.helpers.tiny_exports import make_tiny_model


@pytest.mark.parametrize(("size", "millions"), [("3b", 23.9), ("8b", 35.7), ("14b", 47.2)])
def test_exactly_the_published_number_of_parameters_trains(size: str, millions: float) -> None:
    model = compose_run_config(
        [f"experiment=nld_{size}_joint", "data.train=x", "data.tokenizer=y", "init_from=z"]
    ).model
    config = NemotronLabsDiffusionConfig(
        vocab_size=512,
        hidden_size=model.hidden_size,
        intermediate_size=64,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
    )
    with torch.device("meta"):
        adapted = attach_new_adapter(NemotronLabsDiffusionModel(config), AdapterConfig(), seed=0)
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trainable == count_adapter_parameters(config, 128)
    assert trainable / 1e6 == pytest.approx(millions, abs=0.05)


def test_anything_else_that_trains_is_noticed() -> None:
    model = attach_new_adapter(make_tiny_model(), AdapterConfig(rank=2, alpha=8.0), seed=0)
    next(model.parameters()).requires_grad_()
    with pytest.raises(AssertionError, match="embed_tokens"):
        check_trainable(model, 0)


def test_a_new_adapter_changes_nothing_and_is_fp32_beside_bf16() -> None:
    tokens = torch.arange(20, 40)[None]
    expected = make_tiny_model().bfloat16()(tokens).logits
    adapted = attach_new_adapter(make_tiny_model().bfloat16(), AdapterConfig(rank=4, alpha=16.0), seed=0)
    assert torch.equal(adapted(tokens).logits, expected)
    assert {parameter.dtype for parameter in adapted.parameters() if parameter.requires_grad} == {torch.float32}


def test_the_seed_decides_how_it_begins() -> None:
    def begin(seed: int) -> torch.Tensor:
        model = attach_new_adapter(make_tiny_model(), AdapterConfig(rank=4, alpha=16.0), seed)
        return torch.cat([value.flatten() for value in get_peft_model_state_dict(model).values()])

    assert torch.equal(begin(1), begin(1))
    assert not torch.equal(begin(1), begin(2))


def test_peft_loads_what_is_written_and_computes_the_same(tmp_path: Path) -> None:
    tokens = torch.arange(20, 40)[None]
    model = attach_new_adapter(make_tiny_model(), AdapterConfig(rank=4, alpha=16.0), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    folder = tmp_path / "export" / "linear_spec_lora"
    save_adapter(model, get_peft_model_state_dict(model), folder, {"step": 3})
    base = make_tiny_model()
    check_adapter(folder, base.config)
    loaded = PeftModel.from_pretrained(base, str(folder.parent), subfolder=folder.name)  # pyright: ignore
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    names = load_file(folder / WEIGHTS_FILE).keys()
    assert "base_model.model.encoder.layers.1.self_attn.o_proj.lora_A.weight" in names
    assert len(names) == 4


def test_an_adapter_is_replaced_as_a_whole(tmp_path: Path) -> None:
    model = attach_new_adapter(make_tiny_model(), AdapterConfig(rank=4, alpha=16.0), seed=0)
    folder = tmp_path / "adapter"
    save_adapter(model, get_peft_model_state_dict(model), folder, {"step": 1})
    (folder / "leftover").write_text("x")
    save_adapter(model, get_peft_model_state_dict(model), folder, {"step": 2})
    assert sorted(path.name for path in folder.iterdir()) == [
        "SHA256SUMS",
        "adapter_config.json",
        "adapter_model.safetensors",
        "drafter.json",
    ]
    assert find_damage(folder) is None


def test_the_count_is_layers_times_rank_times_both_widths() -> None:
    config = SimpleNamespace(num_hidden_layers=3, num_attention_heads=4, head_dim=16, hidden_size=24)
    assert count_adapter_parameters(config, 8) == 3 * 8 * (64 + 24)
