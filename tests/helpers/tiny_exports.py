"""A tiny random tri-mode model in the exported format with its tokenizer, and draft adapters that PEFT itself made."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from data_pipeline.chat.template import load_chat_template
from data_pipeline.toy.tokenizer import train_tokenizer
from model.hf.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig, default_rope_parameters
from model.hf.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel

TEXT = "Tell me a story about the sea. The sea is wide and blue, and the ships go out every day. Why? " * 4
VOCAB_SIZE = 380
REPEATED_TOKEN = 200
MAX_POSITIONS = 256
# Of all tiny models: head_dim is not hidden / heads, and weights are wide enough for lively greedy decoding.
TINY: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
    "block_size": 8,
}
TINY_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": 24,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def spread_norms(model: Any) -> None:
    """Randomise the norms of a model, which begin at one: else two of them could be exchanged unnoticed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_pre" in name:
                parameter.uniform_(0.5, 1.5)


def make_tiny_model(**changes: Any) -> NemotronLabsDiffusionModel:
    """Build a model whose weights are always the same, wide enough for lively greedy decoding.

    changes: of the configuration.
    """
    torch.manual_seed(0)
    values: dict[str, Any] = {
        **TINY,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_POSITIONS,
        "eos_token_id": 11,
        "rope_parameters": {**default_rope_parameters(), "original_max_position_embeddings": 32},
    }
    return NemotronLabsDiffusionModel(NemotronLabsDiffusionConfig(**(values | changes))).eval()


def make_repetitive_model(**changes: Any) -> NemotronLabsDiffusionModel:
    """Build a model that repeats REPEATED_TOKEN in all modes: every draft without an adapter is accepted."""
    model = make_tiny_model(**changes)
    with torch.no_grad():
        model.encoder.embed_tokens.weight += 5.0
        model.diffusion_head.weight[REPEATED_TOKEN] = 1.0
    return model


def save_tiny_export(
    directory: Path, *, model: NemotronLabsDiffusionModel | None = None, chat_template: bool = True
) -> Path:
    """Save weights, code and tokenizer of a model (by default make_tiny_model()), and a ChatML template if wanted."""
    (model or make_tiny_model()).save_pretrained(directory)
    tokenizer = train_tokenizer([TEXT], VOCAB_SIZE)
    if chat_template:
        tokenizer.chat_template = load_chat_template(directory, "chatml")
    tokenizer.save_pretrained(directory)
    return directory


def save_drafting_export(directory: Path) -> Path:
    """Save a model that repeats itself, with an adapter in its folder that spoils some drafts."""
    save_tiny_export(directory, model=make_repetitive_model())
    save_random_adapter(directory / "linear_spec_lora", std=2.0)
    return directory


def save_random_adapter(
    folder: Path, *, targets: tuple[str, ...] = ("o_proj",), rank: int = 4, std: float = 0.5, **changes: Any
) -> Path:
    """Save a LoRA of make_tiny_model(**changes) with random weights, not the zeros it would start from."""
    wrapped = get_peft_model(
        make_tiny_model(**changes),  # pyright: ignore[reportArgumentType]
        LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=list(targets)),
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, std)
    wrapped.save_pretrained(str(folder))
    return folder
