"""A tiny random chat model, exported: weights, tokenizer and the ChatML template."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from data_pipeline.chat.template import load_chat_template
from data_pipeline.tokenizer import train_tokenizer
from model.hf.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig, default_rope_parameters
from model.hf.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel

TEXT = "Tell me a story about the sea. The sea is wide and blue, and the ships go out every day. Why? " * 4
VOCAB_SIZE = 380
MAX_POSITIONS = 256


def make_tiny_model() -> NemotronLabsDiffusionModel:
    torch.manual_seed(0)
    config = NemotronLabsDiffusionConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.3,
        block_size=8,
        eos_token_id=11,
        rope_parameters={**default_rope_parameters(), "original_max_position_embeddings": 32},
    )
    return NemotronLabsDiffusionModel(config).eval()


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory; tests that change files take `copy_export`."""
    directory = tmp_path_factory.mktemp("chat") / "export"
    make_tiny_model().save_pretrained(directory)
    tokenizer = train_tokenizer([TEXT], VOCAB_SIZE)
    tokenizer.chat_template = load_chat_template(directory, "chatml")
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def copy_export(export: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(export, tmp_path / "export"))


@pytest.fixture
def add_adapter() -> Callable[..., Path]:
    """Saves a random draft adapter into an export; returns its folder."""

    def add(export: Path, targets: tuple[str, ...] = ("o_proj",)) -> Path:
        wrapped = get_peft_model(
            make_tiny_model(),  # pyright: ignore[reportArgumentType]
            LoraConfig(r=4, lora_alpha=16, target_modules=list(targets)),
        )
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.5)
        wrapped.save_pretrained(str(export / "linear_spec_lora"))
        return export / "linear_spec_lora"

    return add
